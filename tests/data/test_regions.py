"""Test writing and reading region features, and the errors for damaged files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.regions import RegionError, RegionFeatures, Regions, write_regions
from tests.data.image_layouts import FEATURES, HEIGHT, WIDTH, regions

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "m3p" / "joint_forward.npz"
KEYS = ("COCO_val2014_000000000042", "COCO_val2014_000000000007", "flickr_3")


def equal(mine: Regions, other: Regions) -> None:
    np.testing.assert_array_equal(mine.features, other.features)
    np.testing.assert_array_equal(mine.boxes, other.boxes)
    np.testing.assert_array_equal(mine.labels, other.labels)
    assert (mine.height, mine.width) == (other.height, other.width)
    assert mine.features.dtype == mine.boxes.dtype == np.float32
    assert mine.labels.dtype == np.int64


def test_box_vectors_are_those_of_the_official_code() -> None:
    golden = np.load(GOLDEN)
    for boxes, (height, width), expected in zip(golden["boxes"], golden["wh_hw"], golden["loc"]):
        found = replace(regions(0), boxes=boxes, height=height, width=width).box_vectors
        np.testing.assert_allclose(found, expected, atol=1e-6)


#: Side lengths in pixels, rounded to thousandths, since the test counts a length below 1e-5 as zero.
_SIDES = st.floats(0, 100).map(lambda side: round(side, 3))


@settings(max_examples=30)
@given(st.lists(st.tuples(*[_SIDES] * 4), min_size=1, max_size=5), st.integers(1, 500), st.integers(1, 500))
def test_box_vectors_have_length_one(boxes: list[tuple[float, ...]], height: int, width: int) -> None:
    found = replace(regions(0), boxes=np.array(boxes), height=height, width=width)
    lengths = np.linalg.norm(found.box_vectors, axis=-1)
    empty = ~np.any(boxes, axis=1)
    assert np.all(np.isclose(lengths, 1, atol=1e-5) | empty | (lengths < 1e-5))


def write(path: Path, *own: Regions, names: Sequence[str] = KEYS) -> Path:
    """Write a file of region features for pictures 0, 1 and 2, or for the given ones."""
    write_regions(path, zip(names, own or map(regions, range(3))))
    return path


def rewrite(path: Path, **changes: Any) -> Path:
    """Replace columns of a file; None removes the column."""
    if path.suffix == ".npz":
        held = dict(np.load(path)) | changes
        np.savez(path, **{name: values for name, values in held.items() if values is not None})
        return path
    with h5py.File(path, "a") as file:
        for name, values in changes.items():
            if name in file:
                del file[name]
            if values is not None:
                file[name] = values
    return path


# -- reading and writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str) -> None:
    # The file has more than one block, and the later blocks have more regions per picture.
    expected = {f"picture {number}.é": regions(number, 2 + number // 200, distribution=True) for number in range(530)}
    path = tmp_path / "new" / f"a{suffix}"
    write_regions(path, expected.items())
    if suffix == ".h5":  # a picture can be read without its neighbors
        with h5py.File(path) as file:
            assert {file[name].chunks[0] for name in ("features", "bbox")} == {1}
    found = RegionFeatures(path)
    assert list(found.keys) == list(expected)
    assert (len(found), found.feature_size) == (530, FEATURES)
    for key in list(expected)[::53]:
        equal(found[key], expected[key])
        np.testing.assert_array_equal(found[key].distribution, expected[key].distribution)
    with h5py.File(path) if suffix == ".h5" else np.load(path) as file:
        kinds = {name: file[name].dtype.str for name in file if name != "image_id"}
    integers = dict.fromkeys(("height_width", "num_boxes", "objects"), "<i4")
    assert kinds == integers | dict.fromkeys(("bbox", "features", "distribution"), "<f4")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert found.missing([*expected, "another"]) == ["another"]
    with pytest.raises(RegionError, match="another"):
        found["another"]


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_the_authors_columns_are_read(tmp_path: Path, suffix: str) -> None:
    """Read the authors' `wh`, and a class distribution. If a file has the best class too, use the class."""
    own = [regions(number, distribution=True) for number in range(3)]
    path = write(tmp_path / f"a{suffix}", *own, names=[f"{key}.jpg" for key in KEYS])
    rewrite(path, wh=np.full((3, 2), [HEIGHT, WIDTH]), height_width=None, objects=None)
    found = RegionFeatures(path)
    for key, expected in zip(KEYS, own):
        equal(found[key], expected)
    both = rewrite(write(tmp_path / f"b{suffix}", *own), objects=np.full((3, 3), 1))
    assert RegionFeatures(both)[KEYS[0]].labels.tolist() == [1, 1, 1]


def test_several_files_are_one_and_the_first_has_its_way(tmp_path: Path) -> None:
    names = [str(number) for number in range(30)]
    first, second = [regions(number) for number in range(20)], [regions(number) for number in range(20, 50)]
    found = RegionFeatures(
        [write(tmp_path / "0.h5", *first, names=names), write(tmp_path / "1.npz", *second, names=names)]
    )
    assert list(found.keys) == names
    for name, expected in zip(names, [*first, *second[20:]], strict=True):
        equal(found[name], expected)


def test_row_numbers_are_the_digits_of_the_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", names=["train_000012.jpg", "google_7"])
    assert list(RegionFeatures(path, key="number").keys) == ["12", "7"]


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    before = path.read_bytes()

    def broken() -> Any:
        yield "b", regions(1)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_regions(path, broken())
    mixed = [("a", regions(0)), ("b", regions(0, distribution=True))]
    for target, rows in ((path, []), (path, mixed), (tmp_path / "a.pkl", mixed[:1])):
        with pytest.raises(ValueError):
            write_regions(target, rows)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.h5"]


# -- damage ------------------------------------------------------------------------------------------------------------

#: Each case has a function that damages a good file, and a text that the error must contain besides the file name.
DAMAGED: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.unlink(), ""),
    (lambda path: path.write_bytes(b""), ""),
    (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), ""),
    (lambda path: (path.unlink(), os.mkfifo(path)), ""),
    (lambda path: rewrite(path, height_width=None), "height_width"),
    (lambda path: rewrite(path, height_width=np.full((3, 2), np.nan)), ""),
    (lambda path: rewrite(path, bbox=np.zeros((3, 2, 4))), "bbox"),
    (lambda path: rewrite(path, objects=np.zeros((3, 3, 1))), "objects"),
    (lambda path: rewrite(path, features=np.zeros((3, 6))), "features"),
    (lambda path: rewrite(path, num_boxes=np.full(3, 9)), "num_boxes"),
    (lambda path: write(path, names=["a.jpg", "a.png"]), "'a'"),
]


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize(("damage", "named"), DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, suffix: str, damage: Callable[[Path], object], named: str) -> None:
    path = write(tmp_path / f"a{suffix}")
    damage(path)
    with pytest.raises(RegionError, match=rf"{re.escape(str(path))}.*{named}"):
        RegionFeatures(path)[KEYS[0]]


HOSTILE: dict[str, Callable[[h5py.File, Path], object]] = {
    "external storage": lambda file, folder: file.create_dataset(
        "objects", (3, 4), "u1", external=[(str(folder / "secret"), 0, 12)]
    ),
    "virtual": lambda file, folder: file.create_virtual_dataset("objects", virtual(folder)),
    "external link": lambda file, folder: file.__setitem__("objects", h5py.ExternalLink("other.h5", "objects")),
    "circle of links": lambda file, folder: file.__setitem__("objects", h5py.SoftLink("/objects")),
    "group": lambda file, folder: file.create_group("objects"),
    "strings": lambda file, folder: file.create_dataset("objects", (3, 4), h5py.string_dtype()),
    "references": lambda file, folder: file.create_dataset("objects", (3, 4), h5py.ref_dtype),
    "names that are references": lambda file, folder: (
        file.__delitem__("image_id"), file.create_dataset("image_id", (3,), h5py.ref_dtype)
    ),
    "more than memory holds": lambda file, folder: (
        file.__delitem__("num_boxes"), file.create_dataset("num_boxes", (2**60,), "i8", chunks=(8,))
    ),
}  # fmt: skip


def virtual(folder: Path) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((3, 4), "i8")
    layout[:] = h5py.VirtualSource(folder / "other.h5", "objects", (3, 4))
    return layout


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_file_of_a_stranger_leads_nowhere(tmp_path: Path, attack: str) -> None:
    write(tmp_path / "other.h5")
    (tmp_path / "secret").write_bytes(bytes(range(12)))
    path = rewrite(write(tmp_path / "a.h5"), objects=None)
    with h5py.File(path, "a") as file:
        HOSTILE[attack](file, tmp_path)
    with pytest.raises(RegionError, match=re.escape(str(path))):
        RegionFeatures(path)


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", image_id=np.array([{}], dtype=object))
    with pytest.raises(RegionError, match=r"c\.npz"):
        RegionFeatures(tmp_path / "c.npz")


def test_a_column_that_nobody_reads_is_not_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rewrite(write(tmp_path / "a.npz"), bomb=np.zeros(3, dtype="U1"))
    read = np.lib.npyio.NpzFile.__getitem__
    names: list[str] = []
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, name: names.append(name) or read(self, name))
    RegionFeatures(path)
    assert "features" in names
    assert "bomb" not in names


def changed(**changes: Any) -> Regions:
    return Regions(**{**regions(0).__dict__, **changes})


@pytest.mark.parametrize(
    "own",
    [
        changed(features=np.full((3, FEATURES), np.nan, np.float32)),
        changed(boxes=np.full((3, 4), np.inf, np.float32)),
        changed(height=0),
        changed(width=0),
        changed(boxes=np.array([[1, 1, 39, 20]] * 3, np.float32), height=WIDTH, width=HEIGHT),
        changed(boxes=np.array([[1, 1, 20, 39]] * 3, np.float32), height=HEIGHT, width=WIDTH),
        regions(0, 0),
    ],
    ids=["features", "boxes", "height", "width", "width before height", "height before width", "none"],
)
def test_damaged_rows_name_the_picture(tmp_path: Path, own: Regions) -> None:
    found = RegionFeatures(write(tmp_path / "a.h5", regions(1), own, names=["good", "bad"]))
    equal(found["good"], regions(1))
    with pytest.raises(RegionError, match=r"a\.h5, picture 'bad': "):
        found["bad"]


# -- processes ---------------------------------------------------------------------------------------------------------


def _first_feature(found: RegionFeatures, key: str) -> float:
    return float(found[key].features[0, 0])


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_other_processes_open_the_file_anew(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}")
    found = RegionFeatures(path)
    copy = pickle.loads(pickle.dumps(found))
    equal(copy[KEYS[2]], regions(2))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_first_feature, (found, KEYS[1])) == pytest.approx(float(regions(1).features[0, 0]))
    equal(found[KEYS[0]], regions(0))
