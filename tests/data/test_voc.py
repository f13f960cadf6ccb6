"""Pascal VOC: lists, labels with their three states, and boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.data.datasets.voc import PascalVOC
from common.data.listing import DatasetError, DatasetMissing
from tests.data.image_layouts import VOC_CLASSES, write_voc

LISTS = "VOCdevkit/VOC2007/ImageSets/Main"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("nested", [True, False])
def test_splits_and_classes(tmp_path: Path, nested: bool) -> None:
    voc = PascalVOC(write_voc(tmp_path, nested=nested))
    counts = {split: len(voc.listing(split)) for split in voc.splits}
    assert counts == {"train": 2, "val": 3, "trainval": 5, "test": 3}
    listing = voc.listing("trainval")
    # A class may be called as a split is.
    assert listing.classes == VOC_CLASSES
    prefix = "VOCdevkit/" if nested else ""
    assert listing.names == [f"{prefix}VOC2007/JPEGImages/{n:06d}.jpg" for n in range(5, 10)]
    assert all(clip.path.is_file() for clip in listing)
    assert listing.labels.tolist() == [-1] * 5
    status = voc.status()
    assert status.present, status.problem
    assert status.dataset.full_title == "Pascal VOC 2007"
    assert status.dataset.unit == "images"
    assert "trainval: 5 images, published 5,011" in status.notes
    assert "trainval: 3 classes, published 20" in status.notes


def test_labels_have_three_states(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    assert (root / LISTS / "bicycle_test.txt").read_text() == "000010  1\n000011 -1\n000012  0\n"
    voc = PascalVOC(root)
    labels = voc.labels("test")
    assert labels.dtype == np.int8
    # Image k shows class k and, as a difficult example, the next one.
    assert labels.tolist() == [[0, 1, -1], [-1, 0, 1], [1, -1, 0]]
    assert voc.labels("test", voc.listing("test").subset([2, 0])).tolist() == [[1, -1, 0], [0, 1, -1]]
    assert voc.labels("trainval").shape == (5, 3)
    assert voc.labels("test", voc.listing("test").subset([])).shape == (0, 3)


def test_labels_and_boxes_say_the_same(tmp_path: Path) -> None:
    voc = PascalVOC(write_voc(tmp_path))
    for row, boxes in zip(voc.labels("trainval"), voc.boxes("trainval")):
        assert np.flatnonzero(row == 1).tolist() == boxes["labels"][~boxes["difficult"]].tolist()
        assert np.flatnonzero(row == -1).tolist() == boxes["labels"][boxes["difficult"]].tolist()


def test_boxes_begin_at_nought(tmp_path: Path) -> None:
    voc = PascalVOC(write_voc(tmp_path))
    path = tmp_path / "VOCdevkit/VOC2007/Annotations/000010.xml"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    path.write_text(
        path.read_text().replace("<xmax>11</xmax>", "<xmax>10.5</xmax>").replace("</object>", f"{part}</object>", 1)
    )
    boxes = voc.boxes("test")[0]
    # The whole image of 24 x 20 pixels; the part of the first object, as persons have, is not an object.
    assert boxes["boxes"].tolist() == [[0.0, 0.0, 24.0, 20.0], [2.0, 1.0, 10.5, 11.0]]
    assert boxes["boxes"].dtype == np.float32
    assert boxes["labels"].dtype == np.int64
    assert boxes["labels"].tolist() == [1, 2]
    assert boxes["difficult"].tolist() == [False, True]
    assert len(voc.boxes("test", voc.listing("test").subset([2, 2]))) == 2


def test_an_image_without_objects_and_one_without_a_difficult_flag(tmp_path: Path) -> None:
    annotations = write_voc(tmp_path) / "VOCdevkit/VOC2007/Annotations"
    (annotations / "000010.xml").write_text("<annotation></annotation>")
    path = annotations / "000011.xml"
    path.write_text(path.read_text().replace("<difficult>1</difficult>", ""))
    empty, plain, _ = PascalVOC(tmp_path).boxes("test")
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == empty["difficult"].shape == (0,)
    assert plain["difficult"].tolist() == [False, False]


def test_two_years_are_joined(tmp_path: Path) -> None:
    write_voc(tmp_path)
    write_voc(tmp_path, "2012", {"train": 2, "val": 2})
    # As in the archive of 2012: test images without any label.
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/test.txt").write_text("2012_000001\n")
    voc = PascalVOC(tmp_path, years=("2007", "2012"))
    listing = voc.listing("trainval")
    assert len(listing) == 9
    assert [name.split("/")[1] for name in listing.names] == ["VOC2007"] * 5 + ["VOC2012"] * 4
    labels = voc.labels("trainval")
    assert labels.shape == (9, 3)
    assert labels[:5].tolist() == PascalVOC(tmp_path).labels("trainval").tolist()
    assert len(voc.boxes("trainval")) == 9
    assert len(voc.listing("test")) == 3
    assert voc.labels("test").shape == (3, 3)
    assert voc.published_count("trainval") == 16_551
    assert voc.published_count("test") == 4_952
    assert PascalVOC(tmp_path, ["2012"]).published_count("trainval") == 11_540
    assert PascalVOC(tmp_path, ["2012"]).published_count("test") is None
    assert PascalVOC(tmp_path, ["2010"]).published_count("trainval") is None
    assert voc.index_name("trainval") != PascalVOC(tmp_path).index_name("trainval")
    with pytest.raises(DatasetMissing, match=r"VOC2012 lacks the lists"):
        PascalVOC(tmp_path, ["2012"]).listing("test")


def test_years_are_checked(tmp_path: Path) -> None:
    assert PascalVOC(tmp_path, [2007, 2012]).years == ("2007", "2012")  # type: ignore[list-item]
    for years in ((), "2007", ("2007", "2007")):
        with pytest.raises(ValueError, match="years must be a list"):
            PascalVOC(tmp_path, years)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissing, match="VOC2007") as caught:
        PascalVOC(tmp_path).listing("test")
    assert all(line in str(caught.value) for line in PascalVOC.expected_layout.splitlines())
    root = write_voc(tmp_path)
    (root / "VOCdevkit/VOC2007/JPEGImages/000011.jpg").unlink()
    voc = PascalVOC(root)
    listing = voc.listing("test")
    assert (len(listing), listing.missing) == (2, 1)
    assert listing.missing_names == ("VOCdevkit/VOC2007/JPEGImages/000011",)
    assert voc.labels("test").tolist() == [[0, 1, -1], [1, -1, 0]]
    (root / "VOCdevkit/VOC2007/Annotations/000012.xml").unlink()
    with pytest.raises(DatasetMissing, match=r"boxes of an image are missing.*000012\.xml"):
        voc.boxes("test")
    (root / LISTS / "train_test.txt").unlink()
    with pytest.raises(DatasetMissing, match="list of class 'train' is missing"):
        voc.labels("test")
    (root / LISTS / "val.txt").unlink()
    with pytest.raises(DatasetMissing, match="VOC2007 lacks the lists of split 'val'"):
        voc.listing("val")
    with pytest.raises(ValueError, match="no split 'validation'; it has: train, val, trainval, test"):
        voc.labels("validation")


def test_lists_of_classes_that_do_not_name_an_image_once_are_refused(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    for text in ("000010  1\n000011  1\n", "000010  1\n000011  1\n000012 -1\n000012  1\n"):
        (root / LISTS / "train_test.txt").write_text(text)
        with pytest.raises(DatasetError, match="000012"):
            PascalVOC(root).labels("test")
