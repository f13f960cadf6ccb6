"""Test COCO's caption and instance files, and Karpathy's splits."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data import annotations as annotations_module
from common.data.annotations import kept_columns
from common.data.datasets import coco as coco_module
from common.data.datasets.coco import COCO, read_instances
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.localized_narratives import (
    LocalizedNarrativesCOCO,
    LocalizedNarrativesOpenImages,
    write_narratives,
)
from common.data.listing import DatasetMissing
from tests.data.image_layouts import write_coco, write_features, write_image, write_karpathy, write_ln_coco
from tests.data.text_layouts import write_json


def changed(root: Path, name: str, change: Any) -> None:
    path = root / name
    document = json.loads(path.read_text())
    change(document)
    write_json(path, document)


CAPTIONS = "annotations/captions_train2017.json"
INSTANCES = "annotations/instances_train2017.json"


# ------------------------------------------------------------------------------------------------------------- listing
def test_images_without_captions_are_left_out(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    write_image(root / "train2017" / "stranger.jpg")

    def change(document: dict[str, Any]) -> None:
        document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] != 23]
        document["annotations"] += [{"id": 7, "image_id": 23, "caption": " \n"}]

    changed(root, CAPTIONS, change)
    listing = COCO(root).listing("train")
    assert listing.names == [f"train2017/{n:012d}.jpg" for n in (9, 16, 30)]
    assert listing.notes == ("1 images without a caption are left out",)
    assert COCO(root).annotations("train").image_ids.tolist() == [9, 16, 30]


def test_coco_without_instances_has_no_boxes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have no boxes"):
        COCO(write_coco(tmp_path, instances=False)).annotations("train").boxes()


def test_missing_parts_are_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    (root / CAPTIONS).unlink()
    with pytest.raises(DatasetMissing, match=r"captions_train2017\.json"):
        COCO(root).listing("train")
    assert COCO(root).status().counts == {"val": 2}
    for file in (root / "val2017").iterdir():
        file.unlink()
    with pytest.raises(DatasetMissing, match="none of the images of split 'val'"):
        COCO(root).listing("val")


# --------------------------------------------------------------------------------------------------------- annotations
def test_categories_are_numbered_in_the_order_of_the_file(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    numbers = {1: 1, 2: 18, 3: 3}

    def change(document: dict[str, Any]) -> None:
        for entry in document["categories"]:
            entry["id"] = numbers[entry["id"]]
        for entry in document["annotations"]:
            entry["category_id"] = numbers[entry["category_id"]]

    changed(root, INSTANCES, change)
    found = COCO(root).annotations("train")
    assert found.tag_names == ("person", "dog", "car")
    assert [boxes["labels"].tolist() for boxes in found.boxes()] == [[], [0], [0, 1], [0, 1, 2]]


def test_annotations_of_a_subset(tmp_path: Path) -> None:
    coco = COCO(write_coco(tmp_path))
    whole, listing = coco.annotations("train"), coco.listing("train").subset([3, 0, 3])
    found = coco.annotations("train", listing)
    assert found.image_ids.tolist() == [30, 9, 30]
    assert list(found.captions) == [whole.captions[3], whole.captions[0], whole.captions[3]]
    assert found.tags.tolist() == whole.tags[[3, 0, 3]].tolist()
    assert [len(boxes["labels"]) for boxes in found.boxes()] == [3, 0, 3]
    assert not coco.annotations("train", coco.listing("train").subset([])).captions
    with pytest.raises(ValueError, match=r"captions_train2017\.json has no image 'val2017.*of another data set"):
        coco.annotations("train", coco.listing("val"))


def test_groups_and_captions_in_any_script(tmp_path: Path) -> None:
    root = write_coco(tmp_path)

    def change(document: dict[str, Any]) -> None:
        for entry in document["images"][:2]:
            entry["group_id"] = 5
        document["annotations"][0]["caption"] = "  Ein Grün\u2028mit \ud83d 猫 "

    changed(root, CAPTIONS, change)
    found = COCO(root).annotations("train")
    assert found.groups.tolist() == [9, 16, 5, 5]
    assert found.captions[3][0] == "  Ein Grün\u2028mit \ud83d 猫 "
    assert pickle.loads(pickle.dumps(found)).fingerprint() == found.fingerprint()


def test_boxes(tmp_path: Path) -> None:
    root = write_coco(tmp_path)

    def change(document: dict[str, Any]) -> None:
        document["annotations"] += [
            {"id": 900, "image_id": 9, "category_id": 2, "bbox": [3, 4, 0, 5], "iscrowd": 0, "segmentation": []},
            {"id": 901, "image_id": 9, "category_id": 2, "bbox": [3, 4, 2, 5], "segmentation": [[1, 2, 3, 4, 5, 6]]},
        ]
        (last,) = (entry for entry in document["annotations"] if entry["id"] == 3003)
        last.update(iscrowd=1, segmentation={"counts": [1, 2, 3], "size": [20, 24]})

    changed(root, INSTANCES, change)
    found = COCO(root).annotations("train")
    first, _, _, last = found.boxes()
    # The object whose box has no area gives a tag but no box.
    assert first["boxes"].tolist() == [[3.0, 4.0, 5.0, 9.0]]
    assert first["labels"].tolist() == [1]
    assert found.tags[0].tolist() == [False, True, False]
    assert last["boxes"].dtype == np.float32
    assert last["boxes"].tolist() == [[1.5 + n, 2.0, 4.5 + n, 6.25] for n in range(3)]
    assert last["labels"].dtype == np.int64
    assert last["labels"].tolist() == [0, 1, 2]
    assert last["iscrowd"].tolist() == [False, False, True]
    assert [boxes["boxes"].shape for boxes in found.boxes()] == [(1, 4), (1, 4), (2, 4), (3, 4)]


# ------------------------------------------------------------------------------------------------------------- caching
def test_a_file_is_parsed_once_until_it_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_coco(tmp_path)
    read: list[str] = []
    original = coco_module.read_json

    def counted(path: Path, without: frozenset[str] = frozenset()) -> dict[str, Any]:
        read.append(path.name)
        return original(path, without)

    monkeypatch.setattr(coco_module, "read_json", counted)
    for _ in range(2):
        COCO(root).listing("train")
        COCO(root).annotations("train").boxes()
    assert sorted(read) == ["captions_train2017.json", "instances_train2017.json"]
    changed(root, CAPTIONS, lambda document: document["annotations"][0].update(caption="New."))
    assert COCO(root).annotations("train").captions[3][0] == "New."


def test_columns_of_a_large_file_are_kept_on_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations_module, "KEEP_FROM_BYTES", 1)
    root = write_coco(tmp_path / "coco")
    first = COCO(root).annotations("train")
    (kept,) = (cache / "indices").glob("*.npz")
    monkeypatch.setattr(coco_module, "_instance_columns", lambda path: pytest.fail("read again"))
    read_instances.cache_clear()
    again = COCO(root).annotations("train")
    assert again.fingerprint() == first.fingerprint()
    assert [b["boxes"].tolist() for b in again.boxes()] == [b["boxes"].tolist() for b in first.boxes()]
    monkeypatch.undo()
    # A cache file that is damaged or belongs to an older file is written again.
    path = root / INSTANCES
    for damage in (lambda: kept.write_bytes(b"junk"), lambda: os.utime(path, ns=(1, 1))):
        damage()
        monkeypatch.setattr(annotations_module, "KEEP_FROM_BYTES", 1)
        monkeypatch.setenv("ASSEMBLE_CACHE", str(cache))
        columns = kept_columns(path, lambda path: {"crowd": np.zeros(3)})
        assert columns.keys() == {"crowd"}
        assert columns["crowd"].shape == (3,)


# ------------------------------------------------------------------------------------------------------------ Karpathy
def test_restval_can_join_train(tmp_path: Path) -> None:
    root = write_karpathy(tmp_path)
    joined, plain = COCOKarpathy(root, restval=True), COCOKarpathy(root)
    assert len(joined.listing("train")) == 5
    assert len(joined.annotations("train").captions) == 5
    assert len(joined.listing("restval")) == 2
    assert joined.index_name("train") != plain.index_name("train")
    assert joined.published_count("train") == 113_287
    assert plain.published_count("train") == 82_783
    assert set(plain.listing("train").names) < set(joined.listing("train").names)


def test_region_features_stand_in_for_pictures(tmp_path: Path) -> None:
    root = write_karpathy(tmp_path)
    for folder in ("train2014", "val2014"):
        shutil.rmtree(root / folder)
    assert not COCOKarpathy(root).status().present
    keys = [key for split in ("train", "val", "test") for key in COCOKarpathy(root).captions(split).keys]
    write_features(root / "regions" / "all.npz", keys)
    status = COCOKarpathy(root).status()
    assert (status.present, dict(status.counts)) == (True, {"train": 3, "val": 2, "test": 2})


def test_karpathys_groups(tmp_path: Path) -> None:
    root = write_karpathy(tmp_path)
    changed(root, "dataset_coco.json", lambda d: [entry.update(group_id=4) for entry in d["images"]])
    assert COCOKarpathy(root).annotations("train").groups.tolist() == [4, 4, 4]


# ---------------------------------------------------------------------------------------------------------- narratives
@pytest.mark.parametrize("folder", ["annotations", "localized_narratives"])
def test_narratives_in_a_folder_of_their_own(tmp_path: Path, folder: str) -> None:
    dataset = LocalizedNarrativesCOCO(write_ln_coco(tmp_path / "coco", folder=folder))
    part = dataset.annotations("train", dataset.listing("train").subset([1]))
    assert part.captions == [("A woman cuts a cake.",)]
    assert dataset.annotations("validation").captions[0] == ("Ein Zimmer über \u2028 allem 猫.",)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    root = write_ln_coco(tmp_path, parts=3)
    (root / "coco_train_localized_narratives-00001-of-00003.jsonl").unlink()
    with pytest.raises(DatasetMissing, match="1 of 3 parts of coco_train"):
        LocalizedNarrativesCOCO(root).listing("train")


def test_open_images(tmp_path: Path) -> None:
    stems = {
        "train": "open_images_train_v6_localized_narratives",
        "validation": "open_images_validation_localized_narratives",
    }
    for number, (split, stem) in enumerate(stems.items()):
        image = f"{number:016x}"
        write_image(tmp_path / split / f"{image}.jpg", number)
        write_narratives(tmp_path / stem, [(image, f"An image to {split} with.")], 1 if split == "train" else None)
    dataset = LocalizedNarrativesOpenImages(tmp_path)
    assert dataset.annotations("train").captions[0] == ("An image to train with.",)
    assert dataset.listing("val").names == ["validation/0000000000000001.jpg"]
    status = dataset.status()
    assert status.present  # even without the test split
    assert status.counts == {"train": 1, "validation": 1}
