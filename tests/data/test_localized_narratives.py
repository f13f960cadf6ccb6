"""Localized Narratives in their released layout, and COCO 2014 beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.data import annotations as annotations_module
from common.data.datasets.coco_2014 import COCO2014
from common.data.datasets.localized_narratives import LocalizedNarrativesCOCO, LocalizedNarrativesOpenImages
from common.data.listing import DatasetMissing
from tests.data.image_layouts import narrative, write_coco, write_image, write_ln_coco
from tests.data.text_layouts import write_lines as write_json_lines


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("common.files.SETTLED_SECONDS", 0.0)
    return tmp_path / "cache"


@pytest.mark.parametrize("folder", ["", "annotations", "localized_narratives"])
def test_narratives_are_the_captions_of_their_images(tmp_path: Path, folder: str) -> None:
    dataset = LocalizedNarrativesCOCO(write_ln_coco(tmp_path / "coco", folder=folder))
    listing = dataset.listing("train")
    assert listing.names == ["train2017/000000391895.jpg", "train2017/000000522418.jpg"]
    assert (listing.missing, listing.notes) == (0, ("3 narratives, published 134,272",))
    found = dataset.annotations("train", listing)
    assert list(found.captions) == [("A man rides a bike.", "In the front a bike."), ("A woman cuts a cake.",)]
    assert found.tags.shape == (2, 0)
    assert len({number for own in found.caption_ids for number in own}) == 3
    assert dataset.annotations("train", listing.subset([1])).captions[0] == ("A woman cuts a cake.",)
    assert dataset.annotations("validation").captions[0] == ("Ein Zimmer über \u2028 allem 猫.",)
    status = dataset.status()
    assert status.present
    assert status.counts == {"train": 2, "val": 1}


def test_columns_of_large_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(annotations_module, "KEEP_FROM_BYTES", 1)
    root = write_ln_coco(tmp_path / "coco", parts=1)
    first = LocalizedNarrativesCOCO(root).annotations("train")
    assert len(list((cache / "indices").glob("coco_train*.npz"))) == 1
    again = tmp_path / "moved"
    root.rename(again)
    assert LocalizedNarrativesCOCO(again).annotations("train").fingerprint() == first.fingerprint()
    # What was kept for the old place must not answer for other words at the new one.
    path = again / "coco_train_localized_narratives-00000-of-00001.jsonl"
    write_json_lines(path, [narrative(391895, 1, "Other words.")])
    assert list(LocalizedNarrativesCOCO(again).annotations("train").captions) == [("Other words.",)]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    root = write_ln_coco(tmp_path, parts=3)
    (root / "coco_train_localized_narratives-00001-of-00003.jsonl").unlink()
    dataset = LocalizedNarrativesCOCO(root)
    with pytest.raises(DatasetMissing, match="1 of 3 parts of coco_train"):
        dataset.listing("train")
    assert dataset.status().counts == {"val": 1}
    with pytest.raises(DatasetMissing, match="coco_train_localized_narratives"):
        LocalizedNarrativesCOCO(tmp_path / "nowhere").annotations("train")
    (root / "coco_val_localized_narratives.jsonl").unlink()
    with pytest.raises(DatasetMissing, match=r"coco_val_localized_narratives\.jsonl"):
        dataset.annotations("val")


def test_images_without_a_file_are_counted(tmp_path: Path) -> None:
    root = write_ln_coco(tmp_path)
    (root / "train2017" / f"{522418:012d}.jpg").unlink()
    listing = LocalizedNarrativesCOCO(root).listing("train")
    assert (len(listing), listing.missing, listing.missing_names) == (1, 1, ("train2017/000000522418.jpg",))
    assert list(LocalizedNarrativesCOCO(root).annotations("train").captions) == [
        ("A man rides a bike.", "In the front a bike.")
    ]


def test_open_images(tmp_path: Path) -> None:
    stems = {
        "train": "open_images_train_v6_localized_narratives-00000-of-00001",
        "validation": "open_images_validation_localized_narratives",
    }
    for number, (split, stem) in enumerate(stems.items()):
        image = f"{number:016x}"
        write_image(tmp_path / split / f"{image}.jpg", number)
        write_json_lines(tmp_path / f"{stem}.jsonl", [narrative(image, 1, f"An image to {split} with.", "open_images")])
    dataset = LocalizedNarrativesOpenImages(tmp_path)
    assert dataset.annotations("train").captions[0] == ("An image to train with.",)
    assert dataset.listing("val").names == ["validation/0000000000000001.jpg"]
    status = dataset.status()
    assert status.present  # the test split may be missing
    assert status.counts == {"train": 1, "validation": 1}


# ----------------------------------------------------------------------------------------------------------- COCO 2014
def test_coco_2014(tmp_path: Path) -> None:
    dataset = COCO2014(write_coco(tmp_path, 3, year="2014"))
    listing = dataset.listing("train")
    assert listing.names == [f"train2014/COCO_train2014_{n:012d}.jpg" for n in (9, 16, 23)]
    found = dataset.annotations("train", listing)
    assert found.captions[0] == ("Image 9, caption 0.", "Image 9, caption 1.")
    assert found.tag_names == ("person", "dog", "car")
    assert found.tags.tolist() == [[False] * 3, [True, False, False], [True, True, False]]
    assert dataset.annotations("validation").image_ids.tolist() == [5000, 5007]
    assert sum(dataset.published_counts.values()) == 123_287
    notes = dataset.status().notes
    assert "val: 2 images, published 40,504" in notes
    assert "train: 3 images, published 82,783" in notes
    assert np.isfinite([boxes["boxes"].sum() for boxes in found.boxes()]).all()


def test_coco_2014_is_not_mistaken_for_2017(tmp_path: Path) -> None:
    dataset = COCO2014(write_coco(tmp_path, instances=False, year="2014"))
    assert dataset.annotations("val").tags.shape == (2, 0)
    (tmp_path / "annotations" / "captions_train2014.json").unlink()
    with pytest.raises(DatasetMissing, match=r"COCO 2014: nothing at .*captions_train2014\.json"):
        dataset.listing("train")
