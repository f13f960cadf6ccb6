"""Test Pascal VOC (lists, labels with three states, boxes) and ImageNet (class folders and class lists)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.data.datasets.imagenet import ImageNet
from common.data.datasets.voc import PascalVOC
from common.data.listing import DatasetError, DatasetMissing
from tests.data.image_layouts import write_image, write_imagenet, write_voc

LISTS = "VOCdevkit/VOC2007/ImageSets/Main"
CLASSES = ("n01440764", "n01443537", "n02110958")


# ----------------------------------------------------------------------------------------------------------------- VOC
def test_labels_have_three_states(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    assert (root / LISTS / "bicycle_test.txt").read_text() == "000010  1\n000011 -1\n000012  0\n"
    voc = PascalVOC(root)
    # Image k shows class k and, marked as difficult, class k + 1.
    assert voc.labels("test").tolist() == [[0, 1, -1], [-1, 0, 1], [1, -1, 0]]
    assert voc.labels("test", voc.listing("test").subset([2, 0])).tolist() == [[1, -1, 0], [0, 1, -1]]
    assert voc.labels("test", voc.listing("test").subset([])).shape == (0, 3)
    for row, boxes in zip(voc.labels("trainval"), voc.boxes("trainval"), strict=True):
        assert np.flatnonzero(row == 1).tolist() == boxes["labels"][~boxes["difficult"]].tolist()
        assert np.flatnonzero(row == -1).tolist() == boxes["labels"][boxes["difficult"]].tolist()


def test_boxes_begin_at_nought(tmp_path: Path) -> None:
    voc = PascalVOC(write_voc(tmp_path))
    path = tmp_path / "VOCdevkit/VOC2007/Annotations/000010.xml"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    text = path.read_text().replace("<xmax>11</xmax>", "<xmax>10.5</xmax>")
    path.write_text(text.replace("</object>", f"{part}</object>", 1))
    boxes = voc.boxes("test")[0]
    # The first object fills the image of 24 x 20 pixels. Its part (VOC annotates parts of persons) is not an object.
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
    # The archive of 2012 lists test images but has no labels for them.
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/test.txt").write_text("2012_000001\n")
    voc = PascalVOC(tmp_path, years=("2007", "2012"))
    listing = voc.listing("trainval")
    assert [name.split("/")[1] for name in listing.names] == ["VOC2007"] * 5 + ["VOC2012"] * 4
    labels = voc.labels("trainval")
    assert labels[:5].tolist() == PascalVOC(tmp_path).labels("trainval").tolist()
    assert len(labels) == len(voc.boxes("trainval")) == 9
    assert len(voc.listing("test")) == len(voc.labels("test")) == 3
    counts = [voc.published_count("trainval"), voc.published_count("test")]
    assert counts == [16_551, 4_952]
    assert [PascalVOC(tmp_path, ["2012"]).published_count(split) for split in ("trainval", "test")] == [11_540, None]
    assert voc.index_name("trainval") != PascalVOC(tmp_path).index_name("trainval")
    with pytest.raises(DatasetMissing, match=r"VOC2012 lacks the lists"):
        PascalVOC(tmp_path, ["2012"]).listing("test")


def test_lists_of_classes_that_do_not_name_an_image_once_are_refused(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    for text in ("000010  1\n000011  1\n", "000010  1\n000011  1\n000012 -1\n000012  1\n"):
        (root / LISTS / "train_test.txt").write_text(text)
        with pytest.raises(DatasetError, match="000012"):
            PascalVOC(root).labels("test")


# ------------------------------------------------------------------------------------------------------------ ImageNet
def test_a_class_without_images_keeps_its_number(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path)
    for file in (root / "val" / CLASSES[1]).iterdir():
        file.unlink()
    (root / "val" / CLASSES[1]).rmdir()
    listing = ImageNet(root).listing("validation")
    assert listing.classes == CLASSES
    assert listing.labels.tolist() == [0, 2]
    assert listing.notes == ("1 of 3 classes have no images",)


def test_the_flat_archive_is_explained(tmp_path: Path) -> None:
    write_imagenet(tmp_path, val=0)
    write_image(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DatasetMissing, match=r"expected one folder per class.*valprep\.sh"):
        ImageNet(tmp_path).listing("validation")
    assert ImageNet(tmp_path).status().counts == {"train": 9}


def test_a_class_list(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "imagenet")
    path = tmp_path / "classes.txt"
    path.write_text("n02110958 pug\r\n\nn01440764\n")
    chosen, whole = ImageNet(root, class_list=str(path)), ImageNet(root)
    listing = chosen.listing("train")
    assert listing.classes == ("n01440764", "n02110958")
    assert listing.labels.tolist() == [0, 0, 0, 1, 1, 1]
    status = chosen.status()
    assert status.present
    assert not status.notes
    assert chosen.full_title == "ImageNet (ILSVRC 2012), classes of classes.txt"
    before = chosen.index_name("train")
    assert before != whole.index_name("train")
    path.write_text("n02110958\n")
    assert chosen.index_name("train") != before
    assert chosen.listing("val").classes == ("n02110958",)
    path.unlink()
    with pytest.raises(DatasetMissing, match=r"no class_list.*classes\.txt"):
        chosen.listing("train")
    assert not chosen.status().present
