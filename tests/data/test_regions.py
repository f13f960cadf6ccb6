"""Region features: every layout gives the same regions, damage is named, and what is written is read back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.regions import RegionError, RegionFeatures, Regions, box_vectors, write_regions
from tests.data.region_layouts import FEATURES, HEIGHT, WIDTH, columns, regions, write_columns

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "m3p" / "joint_forward.npz"
NAMES = ("COCO_val2014_000000000042.jpg", "COCO_val2014_000000000007.jpg", "flickr_3")
KEYS = ("COCO_val2014_000000000042", "COCO_val2014_000000000007", "flickr_3")


def equal(mine: Regions, other: Regions, tolerance: float = 0.0) -> None:
    np.testing.assert_allclose(mine.features, other.features, atol=tolerance)
    np.testing.assert_array_equal(mine.boxes, other.boxes)
    np.testing.assert_array_equal(mine.labels, other.labels)
    assert (mine.height, mine.width) == (other.height, other.width)
    assert mine.features.dtype == mine.boxes.dtype == np.float32
    assert mine.labels.dtype == np.int64


# ---------------------------------------------------------------------------------------------------- boxes
def test_box_vectors_are_those_of_the_official_code() -> None:
    golden = np.load(GOLDEN)
    for boxes, (height, width), expected in zip(golden["boxes"], golden["wh_hw"], golden["loc"]):
        np.testing.assert_allclose(box_vectors(boxes, height, width), expected, atol=1e-6)


#: Pixels; of less than a thousandth no length can be told from nothing.
_SIDES = st.floats(0, 100).map(lambda side: round(side, 3))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[_SIDES] * 4), min_size=1, max_size=5), st.integers(1, 500), st.integers(1, 500))
def test_box_vectors_have_length_one(boxes: list[tuple[float, ...]], height: int, width: int) -> None:
    lengths = np.linalg.norm(box_vectors(boxes, height, width), axis=-1)
    empty = ~np.any(boxes, axis=1)
    assert np.all(np.isclose(lengths, 1, atol=1e-5) | empty | (lengths < 1e-5))


# ---------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("layout", ["new.h5", "new.npz", "old.h5", "old.npz"])
def test_every_layout_gives_the_same_regions(layout: str, tmp_path: Path) -> None:
    expected = [regions(number, count, distribution=True) for number, count in enumerate((3, 1, 4))]
    path = tmp_path / layout
    write_columns(path, columns(NAMES, expected, old=layout.startswith("old")))
    found = RegionFeatures(path)
    assert sorted(found.keys) == sorted(KEYS)
    assert (len(found), found.feature_size) == (3, FEATURES)
    assert found.max_regions >= 1
    for key, own in zip(KEYS, expected):
        equal(found[key], own)
        if layout.startswith("old"):
            np.testing.assert_array_equal(found[key].distribution, own.distribution)
    assert KEYS[0] in found
    assert "another" not in found
    assert found.missing([*KEYS, "another"]) == ["another"]
    with pytest.raises(KeyError):
        found["another"]


def test_several_files_are_one_and_the_first_has_its_way(tmp_path: Path) -> None:
    first, second, third = (regions(number) for number in range(3))
    paths = [
        write_columns(tmp_path / "train_0.h5", columns(KEYS[:2], [first, second])),
        write_columns(tmp_path / "train_1.npz", columns(KEYS[1:], [third, third])),
    ]
    found = RegionFeatures(paths)
    assert list(found.keys) == list(KEYS)
    equal(found[KEYS[1]], second)
    equal(found[KEYS[2]], third)


def test_row_numbers_are_the_digits_of_the_names(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.npz", columns(["train_000012.jpg", "google_7"], [regions(0), regions(1)]))
    found = RegionFeatures(path, key="number")
    assert list(found.keys) == ["12", "7"]
    write_columns(path, columns(["nothing", "7"], [regions(0), regions(1)]))
    with pytest.raises(RegionError, match="'nothing' has no number"):
        RegionFeatures(path, key="number")


def test_a_table_is_padded(tmp_path: Path) -> None:
    expected = [regions(0, 2), regions(1, 4)]
    path = write_columns(tmp_path / "a.npz", columns(KEYS[:2], expected))
    table = RegionFeatures(path).table([KEYS[1], KEYS[0]])
    assert table.features.shape == (2, 4, FEATURES)
    assert table.mask.sum(1).tolist() == [4, 2]
    np.testing.assert_array_equal(table.features[1, :2], expected[0].features)
    np.testing.assert_array_equal(table.boxes[1, :2], expected[0].box_vectors)
    assert not table.features[1, 2:].any()
    assert not table.boxes[1, 2:].any()
    assert list(table.keys) == [KEYS[1], KEYS[0]]
    assert len(table) == 2
    with pytest.raises(RegionError, match=r"1 of 2 pictures have no region features, such as b.*--extract-regions"):
        RegionFeatures(path).table([KEYS[0], "b"])


# ---------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    held = columns(KEYS, [regions(number) for number in range(3)])
    with pytest.raises(FileNotFoundError, match="no such file"):
        RegionFeatures(path)
    path.write_bytes(b"")
    with pytest.raises(RegionError, match=rf"a{suffix}: "):
        RegionFeatures(path)
    write_columns(path, held)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RegionError, match=rf"a{suffix}: "):
        RegionFeatures(path)
    write_columns(path, {name: values for name, values in held.items() if name != "wh"})
    with pytest.raises(RegionError, match="no column height_width or wh"):
        RegionFeatures(path)
    for changes in (
        {"bbox": held["bbox"][:, :2]},
        {"objects": held["objects"][:2]},
        {"objects": held["objects"][..., None]},
        {"wh": held["wh"][:, :1]},
        {"features": held["features"][0]},
    ):
        write_columns(path, {**held, **changes})
        with pytest.raises(RegionError, match="do not fit each other"):
            RegionFeatures(path)
    write_columns(path, {**held, "num_boxes": held["num_boxes"] + 9})
    with pytest.raises(RegionError, match="num_boxes runs from 12 to 12 of 4"):
        RegionFeatures(path)
    write_columns(path, columns(["a.jpg", "a.png"], [regions(0), regions(1)]))
    with pytest.raises(RegionError, match="'a' occurs twice"):
        RegionFeatures(path)


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
    held = columns(KEYS, [regions(number) for number in range(3)])
    write_columns(tmp_path / "other.h5", held)
    (tmp_path / "secret").write_bytes(bytes(range(12)))
    path = write_columns(tmp_path / "a.h5", {name: values for name, values in held.items() if name != "objects"})
    with h5py.File(path, "a") as file:
        HOSTILE[attack](file, tmp_path)
    with pytest.raises(RegionError, match=re.escape(str(path))):
        RegionFeatures(path)


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_other_damage_names_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    os.mkfifo(path)
    with pytest.raises(RegionError, match=re.escape(str(path))):
        RegionFeatures(path)
    path.unlink()
    held = columns(KEYS, [regions(number) for number in range(3)])
    write_columns(path, {**held, "wh": np.full((3, 2), np.nan)})
    with pytest.raises(RegionError, match=re.escape(str(path))):
        RegionFeatures(path)[KEYS[0]]
    np.savez_compressed(tmp_path / "b.npz", **held)
    content = bytearray((tmp_path / "b.npz").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(RegionError, match=r"b\.npz"):
        RegionFeatures(tmp_path / "b.npz")


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", image_id=np.array([{}], dtype=object))
    with pytest.raises(RegionError, match=r"c\.npz"):
        RegionFeatures(tmp_path / "c.npz")


def changed(**changes: Any) -> Regions:
    return Regions(**{**regions(0).__dict__, **changes})


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (changed(features=np.full((3, FEATURES), np.nan, np.float32)), "no finite numbers"),
        (changed(boxes=np.full((3, 4), np.inf, np.float32)), "no finite numbers"),
        (changed(height=0), "has no size"),
        (changed(boxes=np.array([[1, 1, 39, 20]] * 3, np.float32), height=WIDTH, width=HEIGHT), "height, then width"),
        (regions(0, 0), "no regions"),
    ],
)
def test_damaged_rows_name_the_picture(tmp_path: Path, own: Regions, message: str) -> None:
    path = write_columns(tmp_path / "a.h5", columns(["good", "bad"], [regions(1), own]))
    found = RegionFeatures(path)
    equal(found["good"], regions(1))
    with pytest.raises(RegionError, match=rf"a\.h5, picture 'bad': .*{message}"):
        found["bad"]


def test_files_of_different_width_and_unknown_kind(tmp_path: Path) -> None:
    one = write_columns(tmp_path / "a.npz", columns(["a"], [regions(0)]))
    other = regions(1)
    wide = Regions(np.zeros((3, 9), np.float32), other.boxes, other.labels, HEIGHT, WIDTH)
    two = write_columns(tmp_path / "b.npz", columns(["b"], [wide]))
    with pytest.raises(RegionError, match="one width"):
        RegionFeatures([one, two])
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(RegionError, match=r"\.h5, \.hdf5, \.npz files"):
        RegionFeatures(tmp_path / "c.txt")
    with pytest.raises(ValueError, match="no file"):
        RegionFeatures([])


# ---------------------------------------------------------------------------------------------------- processes
def _first_feature(found: RegionFeatures, key: str) -> float:
    return float(found[key].features[0, 0])


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_other_processes_open_the_file_anew(tmp_path: Path, suffix: str) -> None:
    path = write_columns(tmp_path / f"a{suffix}", columns(KEYS, [regions(number) for number in range(3)]))
    found = RegionFeatures(path)
    copy = pickle.loads(pickle.dumps(found))
    equal(copy[KEYS[2]], regions(2))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_first_feature, (found, KEYS[1])) == pytest.approx(float(regions(1).features[0, 0]))
    equal(found[KEYS[0]], regions(0))


# ---------------------------------------------------------------------------------------------------- writing
@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("half", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str, half: bool) -> None:
    # More than one block, and the later ones have more regions.
    expected = {f"picture {number}.é": regions(number, 2 + number // 200, distribution=True) for number in range(530)}
    path = tmp_path / "new" / f"a{suffix}"
    assert write_regions(path, expected.items(), half) == 530
    found = RegionFeatures(path)
    assert list(found.keys) == list(expected)
    assert found.max_regions == 4
    for key in list(expected)[::53]:
        equal(found[key], expected[key], 3e-3 if half else 0.0)
        np.testing.assert_allclose(found[key].distribution, expected[key].distribution, atol=1e-3 if half else 0)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    if suffix == ".h5":
        with h5py.File(path) as file:
            assert file["height_width"][0].tolist() == [HEIGHT, WIDTH]
            assert file["image_id"][0] == "picture 0.é".encode()
            assert file["features"].dtype == (np.float16 if half else np.float32)


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_regions(path, [("a", regions(0))])
    before = path.read_bytes()

    def broken() -> Any:
        yield "b", regions(1)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_regions(path, broken())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.h5"]
    with pytest.raises(ValueError, match="no pictures"):
        write_regions(path, [])
    with pytest.raises(ValueError, match="must end with"):
        write_regions(tmp_path / "a.pkl", [])
    with pytest.raises(ValueError, match="only some"):
        write_regions(path, [("a", regions(0)), ("b", regions(0, distribution=True))])
