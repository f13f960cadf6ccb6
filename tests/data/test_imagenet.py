"""ImageNet: class folders, class lists, and the flat validation archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.data.datasets.imagenet import ImageNet
from common.data.listing import DatasetMissing
from tests.data.image_layouts import write_image, write_imagenet

CLASSES = ("n01440764", "n01443537", "n02110958")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("parent", ["", "ILSVRC/Data/CLS-LOC"])
def test_class_folders(tmp_path: Path, parent: str) -> None:
    write_imagenet(tmp_path / parent)
    imagenet = ImageNet(tmp_path)
    train, validation = imagenet.listing("train"), imagenet.listing("val")
    assert train.classes == validation.classes == CLASSES
    assert (len(train), len(validation)) == (9, 3)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(clip.path.is_file() for clip in train)
    prefix = f"{parent}/" if parent else ""
    assert validation.names[0] == f"{prefix}val/n01440764/ILSVRC2012_val_00000000.JPEG"
    assert imagenet.listing("validation").fingerprint() == validation.fingerprint()


def test_the_status_counts(tmp_path: Path) -> None:
    status = ImageNet(write_imagenet(tmp_path)).status()
    assert status.present
    assert status.counts == {"train": 9, "validation": 3}
    assert status.dataset.unit == "images"
    assert "train: 9 images, published 1,281,167" in status.notes
    assert "validation: 3 images, published 50,000" in status.notes
    assert "train: 3 classes, published 1000" in status.notes


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
    with pytest.raises(DatasetMissing, match=r"one folder per class is expected.*valprep\.sh"):
        ImageNet(tmp_path).listing("validation")
    status = ImageNet(tmp_path).status()
    assert not status.present
    assert status.counts == {"train": 9}
    assert "side by side" in status.problem


def test_missing_folders_explain_themselves(tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DatasetMissing) as caught:
            ImageNet(root).listing("train")
        assert all(line in str(caught.value) for line in ImageNet.expected_layout.splitlines())
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    with pytest.raises(DatasetMissing, match="none of the images of split 'train'"):
        ImageNet(tmp_path).listing("train")


def test_a_class_list(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "imagenet")
    path = tmp_path / "classes.txt"
    path.write_text("n02110958 pug\r\n\nn01440764\n")
    chosen, whole = ImageNet(root, class_list=str(path)), ImageNet(root)
    listing = chosen.listing("train")
    assert listing.classes == ("n01440764", "n02110958")
    assert listing.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(whole.listing("train")) == 9
    status = chosen.status()
    assert status.present
    assert not status.notes
    assert status.dataset.full_title == "ImageNet (ILSVRC 2012), classes of classes.txt"
    assert chosen.index_name("train") != whole.index_name("train")
    before = chosen.index_name("train")
    path.write_text("n02110958\n")
    assert chosen.index_name("train") != before
    assert chosen.listing("val").classes == ("n02110958",)


def test_a_missing_class_list_is_missing_data(tmp_path: Path) -> None:
    imagenet = ImageNet(write_imagenet(tmp_path), class_list=tmp_path / "none.txt")
    with pytest.raises(DatasetMissing, match=r"no class_list.*none\.txt"):
        imagenet.listing("train")
    assert not imagenet.status().present
