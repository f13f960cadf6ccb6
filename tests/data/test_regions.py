"""Region features: every layout gives the same regions, damage is named, and what is written is read back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.regions import RegionError, RegionFeatures, Regions, box_vectors, write_regions
from tests.data.region_layouts import FEATURES, HEIGHT, WIDTH, columns, regions, write_columns, write_mmf

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


def test_a_picture_without_size_has_no_box_vectors() -> None:
    with pytest.raises(ValueError, match="has no size"):
        box_vectors(np.zeros((1, 4)), 0, 5)


# ---------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("layout", ["new.h5", "new.npz", "old.h5", "old.npz", "mmf", "compressed"])
def test_every_layout_gives_the_same_regions(layout: str, tmp_path: Path) -> None:
    expected = [regions(number, count, distribution=True) for number, count in enumerate((3, 1, 4))]
    path = tmp_path / layout
    if layout == "mmf":
        for name, own in zip(KEYS, expected):
            write_mmf(path, name, own)
    elif layout == "compressed":
        path = tmp_path / "features.npz"
        np.savez_compressed(path, **columns(NAMES, expected))
    else:
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
    with pytest.raises(RegionError, match=rf"a{suffix}: damaged"):
        RegionFeatures(path)
    write_columns(path, held)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RegionError, match=rf"a{suffix}: damaged"):
        RegionFeatures(path)
    write_columns(path, {name: values for name, values in held.items() if name != "wh"})
    with pytest.raises(RegionError, match="no height_width or wh; it holds bbox, features"):
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


def test_the_first_picture_of_mmf_may_have_fewer_regions_than_others(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        write_mmf(tmp_path, name, regions(number, 1 + 2 * number))
    table = RegionFeatures(tmp_path).table(["a", "b"])
    assert table.mask.sum(1).tolist() == [1, 3]
    np.testing.assert_allclose(table.features[1], regions(1, 3).features)


def test_damage_in_a_folder_of_mmf(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="no folder of MMF"):
        RegionFeatures(tmp_path)
    write_mmf(tmp_path, "a", regions(0))
    for name, changes in {
        "no_boxes": {"bbox": ...},
        "few_boxes": {"bbox": np.zeros((1, 4))},
        "no_size": {"image_width": "wide"},
    }.items():
        write_mmf(tmp_path, name, regions(1), **changes)
    write_mmf(tmp_path, "lonely", regions(1))
    (tmp_path / "lonely.npy").unlink()
    write_mmf(tmp_path, "cut", regions(1))
    content = (tmp_path / "cut_info.npy").read_bytes()
    (tmp_path / "cut_info.npy").write_bytes(content[: len(content) // 2])
    found = RegionFeatures(tmp_path)
    equal(found["a"], regions(0))
    for name in ("no_boxes", "few_boxes", "no_size", "lonely", "cut"):
        with pytest.raises(RegionError, match=name):
            found[name]


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 3",)


def test_a_file_from_a_stranger_runs_nothing(tmp_path: Path) -> None:
    write_mmf(tmp_path, "a", regions(0))
    write_mmf(tmp_path, "b", regions(0), objects=Harmful())
    found = RegionFeatures(tmp_path)
    with pytest.raises(RegionError, match="not opened for safety"):
        found["b"]
    np.savez(tmp_path / "c.npz", image_id=np.array([Harmful()], dtype=object))
    with pytest.raises(RegionError, match="damaged"):
        RegionFeatures(tmp_path / "c.npz")


def pickled(folder: Path, content: bytes) -> Path:
    """A folder of MMF with one picture, `a`, whose dictionary is this pickle."""
    write_mmf(folder, "a", regions(0))
    with (folder / "a_info.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
        stream.write(content)
    return folder


# Opcodes of a pickle that NumPy's own hooks would follow.
EMPTY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
OBJECTS_WITHOUT_FLAGS = b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8I0\nI1\ntR(I3\nX\x01\x00\x00\x00|NNNI-1\nI-1\nI0\ntb"
POINTER = b"(I1\n(I1\nt" + OBJECTS_WITHOUT_FLAGS + b"I00\nC\x08AAAAAAAAtb"

ATTACKS = {
    "raw pointers": (EMPTY_ARRAY + POINTER + b".", "an array of objects|damaged array"),
    "raw pointers as a value": (b"}X\x04\x00\x00\x00bbox" + EMPTY_ARRAY + POINTER + b"s.", "damaged array|of objects"),
    "raw pointers as a scalar": (
        b"cnumpy.core.multiarray\nscalar\n(" + OBJECTS_WITHOUT_FLAGS + b"C\x08AAAAAAAAtR.",
        "an array of objects",
    ),
    "raw pointers in a buffer": (
        b"cnumpy.core.numeric\n_frombuffer\n(C\x08AAAAAAAA" + OBJECTS_WITHOUT_FLAGS + b"(I1\ntX\x01\x00\x00\x00CtR.",
        "an array of objects",
    ),
    "a module that is run when imported": (b"cnumpy.f2py.__main__\ndtype\n.", "numpy.f2py.__main__.dtype"),
    "a module with a known name": (b"cnumpy.testing\nndarray\n.", "numpy.testing.ndarray"),
    "a name with dots": (b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.names\x93.", "numpy.dtype.names"),
    "a command": (b"cos\nsystem\n(X\x06\x00\x00\x00exit 3tR.", "os.system"),
    "records": (b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8I0\nI1\ntR.", "an array of 'V8'"),
    "more than there is": (
        EMPTY_ARRAY + b"(I1\n(I999999999\nI999999999\ntcnumpy\ndtype\n(X\x02\x00\x00\x00f8tRI00\nC\x00tb.",
        "0 bytes for an array",
    ),
    "a negative shape": (
        EMPTY_ARRAY + b"(I1\n(I-1\nI-1\ntcnumpy\ndtype\n(X\x02\x00\x00\x00u1tRI00\nC\x01Atb.",
        "damaged shape",
    ),
    "attributes of a class": (b"cnumpy\ndtype\nN(X\x04\x00\x00\x00codeX\x02\x00\x00\x00O8d\x86b.", "damaged"),
    "attributes of a reader": (b"c_codecs\nencode\nN}X\x04\x00\x00\x00heldI1\ns\x86b.", "damaged"),
    "a dictionary that holds itself": (b"}q\x00X\x04\x00\x00\x00bboxh\x00s.", "'bbox'"),
    "endless nesting": (b"}X\x04\x00\x00\x00bbox" + b"]" * 100_000 + b"a" * 99_999 + b"s.", "'bbox'"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_dictionary_from_a_stranger_can_do_nothing(attack: str, tmp_path: Path) -> None:
    """Read in a process of its own: what gets through would end it, or print."""
    content, told = ATTACKS[attack]
    folder = pickled(tmp_path / "mmf", content)
    code = (
        "import sys\nfrom common.data.regions import RegionError, RegionFeatures\nbefore = set(sys.modules)\n"
        "try:\n    print('read', RegionFeatures(sys.argv[1])['a'])\n"
        "except RegionError as error:\n    print('refused:', error)\n"
        "print('imported:', [name for name in set(sys.modules) - before if name.startswith('numpy.')])\n"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    refused, imported = found.stdout.splitlines()
    assert refused.startswith(f"refused: {folder / 'a.npy'}: ")
    assert re.search(told, refused)
    assert imported == "imported: []"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("package", ["core", "_core"])
def test_dictionaries_of_all_times_are_read(protocol: int, package: str, tmp_path: Path) -> None:
    """Pickles of every protocol and of NumPy 1 and 2, other byte orders and layouts of memory."""
    own = regions(0)
    info = {
        "bbox": np.asfortranarray(own.boxes.astype(">f8")),
        "objects": own.labels.astype(np.int16),
        "num_boxes": np.int64(len(own)),
        "image_width": own.width,
        "image_height": np.float32(own.height),
        "cls_prob": np.zeros((3, 4), np.float16),
        "note": "made elsewhere",
    }
    content = pickle.dumps(np.array(info, dtype=object), protocol=protocol)
    if protocol < 4:  # names stand with their lengths in later ones
        content = content.replace(b"numpy._core.", f"numpy.{package}.".encode())
    equal(RegionFeatures(pickled(tmp_path, content))["a"], own)


def test_files_of_different_width_and_unknown_kind(tmp_path: Path) -> None:
    one = write_columns(tmp_path / "a.npz", columns(["a"], [regions(0)]))
    other = regions(1)
    wide = Regions(np.zeros((3, 9), np.float32), other.boxes, other.labels, HEIGHT, WIDTH)
    two = write_columns(tmp_path / "b.npz", columns(["b"], [wide]))
    with pytest.raises(RegionError, match="different widths"):
        RegionFeatures([one, two])
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(RegionError, match=r"\.h5, \.hdf5, \.npz files or a folder"):
        RegionFeatures(tmp_path / "c.txt")
    with pytest.raises(ValueError, match="at least one file"):
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
    wide = Regions(np.zeros((1, 9), np.float32), np.zeros((1, 4), np.float32), np.zeros(1, np.int64), 1, 1)
    with pytest.raises(ValueError, match="'b': 9 features where others have 6"):
        write_regions(path, [("a", regions(0)), ("b", wide)])
    with pytest.raises(ValueError, match="only some"):
        write_regions(path, [("a", regions(0)), ("b", regions(0, distribution=True))])
