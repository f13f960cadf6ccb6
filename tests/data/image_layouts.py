"""Tiny image data sets on disk in the layouts in which the real ones are distributed, with real JPEG files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = ({"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 3, "name": "car"})
VOC_CLASSES = ("aeroplane", "bicycle", "train")


def write_image(path: Path, number: int = 0, size: tuple[int, int] = (24, 20)) -> Path:
    """Write a small JPEG (width, height) whose content depends on the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(path, "JPEG", quality=95, subsampling=0)
    return path


def write_json(path: Path, document: object) -> Path:
    """Write a JSON file and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def captions_document(images: int, captions: int = 2, first: int = 9) -> dict[str, Any]:
    """What a file of captions holds; images in falling order of their numbers, so that sorting shows."""
    numbers = [first + 7 * row for row in reversed(range(images))]
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 20, "width": 24, "license": 3} for n in numbers],
        "annotations": [
            {"id": 1000 * n + c, "image_id": n, "caption": f"Image {n}, caption {c}."}
            for c in range(captions)
            for n in numbers
        ],
    }


def instances_document(
    images: int, first: int = 9, categories: Sequence[Mapping[str, Any]] = CATEGORIES
) -> dict[str, Any]:
    """What a file of instances holds: image k of the sorted ones has k instances, of categories 0, 1, 2, 0, ..."""
    document = captions_document(images, 0, first)
    document["categories"] = [{"supercategory": "thing", **category} for category in categories]
    document["annotations"] = [
        {
            "id": 100 * row + number,
            "image_id": first + 7 * row,
            "category_id": categories[number % len(categories)]["id"],
            "bbox": [1.5 + number, 2.0, 3.0, 4.25],
            "area": 12.75,
            "iscrowd": int(number == 2),
            "segmentation": {"counts": [1, 2, 3], "size": [20, 24]}
            if number == 2
            else [[1.5, 2.0, 4.5, 2.0, 4.5, 6.25]],
        }
        for row in range(images)
        for number in range(row)
    ]
    return document


def write_coco(root: Path, train: int = 4, val: int = 2, instances: bool = True, folder: str = "") -> Path:
    """COCO 2017: image folders and `annotations/`."""
    for split, count, first in (("train", train, 9), ("val", val, 5000)):
        document = captions_document(count, first=first)
        for entry in document["images"]:
            write_image(root / folder / f"{split}2017" / entry["file_name"], entry["id"])
        write_json(root / "annotations" / f"captions_{split}2017.json", document)
        if instances:
            write_json(root / "annotations" / f"instances_{split}2017.json", instances_document(count, first))
    return root


def karpathy_document(train: int = 3, restval: int = 2, val: int = 2, test: int = 2) -> dict[str, Any]:
    """What `dataset_coco.json` holds."""
    images: list[dict[str, Any]] = []
    for split, count in (("test", test), ("train", train), ("val", val), ("restval", restval)):
        for _ in range(count):
            number = 900 - 11 * len(images)
            folder = "train2014" if split == "train" else "val2014"
            sentences = [
                {
                    "tokens": ["image", str(number)],
                    "raw": f"Image {number}: {c}.",
                    "imgid": len(images),
                    "sentid": 10 * number + c,
                }
                for c in range(2)
            ]
            images.append(
                {
                    "filepath": folder,
                    "sentids": [sentence["sentid"] for sentence in sentences],
                    "filename": f"COCO_{folder}_{number:012d}.jpg",
                    "imgid": len(images),
                    "split": split,
                    "sentences": sentences,
                    "cocoid": number,
                }
            )
    return {"images": images, "dataset": "coco"}


def write_karpathy(root: Path, folder: str = "", **counts: int) -> Path:
    """COCO 2014 with Karpathy's list."""
    document = karpathy_document(**counts)
    for entry in document["images"]:
        write_image(root / folder / entry["filepath"] / entry["filename"], entry["cocoid"])
    write_json(root / "dataset_coco.json", document)
    return root


def voc_annotation(objects: Sequence[tuple[str, tuple[float, float, float, float], int]]) -> str:
    """XML of an image with objects (class, box, difficult); the first has a part, as persons do."""
    text = "<annotation>\n<folder>VOC2007</folder>\n<size><width>24</width><height>20</height><depth>3</depth></size>\n"
    for number, (name, box, difficult) in enumerate(objects):
        sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
        part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>" if number == 0 else ""
        text += (
            f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
            f"<bndbox>{sides}</bndbox>{part}</object>\n"
        )
    return f"{text}</annotation>\n"


def write_voc(
    root: Path,
    year: str = "2007",
    splits: Mapping[str, int] | None = None,
    classes: Sequence[str] = VOC_CLASSES,
    nested: bool = True,
) -> Path:
    """Pascal VOC of one year: image k shows class k and, as a difficult example, the next one."""
    folder = root / "VOCdevkit" / f"VOC{year}" if nested else root / f"VOC{year}"
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    splits = {"train": 2, "val": 3, "test": 3} if splits is None else splits
    images: dict[str, list[int]] = {}
    for split, count in splits.items():
        images[split] = [len([n for own in images.values() for n in own]) + row + 5 for row in range(count)]
    if "train" in images and "val" in images:
        images["trainval"] = sorted(images["train"] + images["val"])

    def state(number: int, label: int) -> int:
        return {0: 1, 1: 0}.get((label - number) % len(classes), -1)

    for split, numbers in images.items():
        names = [f"{n:06d}" if year == "2007" else f"{year}_{n:06d}" for n in numbers]
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for label, class_name in enumerate(classes):
            lines = [f"{name} {state(number, label):2d}\n" for name, number in zip(names, numbers)]
            (lists / f"{class_name}_{split}.txt").write_text("".join(lines))
        for name, number in zip(names, numbers):
            write_image(folder / "JPEGImages" / f"{name}.jpg", number)
            shown = [(classes[number % len(classes)], (1.0, 1.0, 24.0, 20.0), 0)]
            if len(classes) > 1:
                shown.append((classes[(number + 1) % len(classes)], (3.0, 2.0, 10.5, 11.0), 1))
            (folder / "Annotations").mkdir(exist_ok=True)
            (folder / "Annotations" / f"{name}.xml").write_text(voc_annotation(shown))
    return root


def write_imagenet(
    root: Path, classes: Sequence[str] = ("n01440764", "n01443537", "n02110958"), train: int = 3, val: int = 1
) -> Path:
    """ImageNet: class folders in both splits."""
    for label, name in enumerate(classes):
        for number in range(train):
            write_image(root / "train" / name / f"{name}_{number}.JPEG", 100 * label + number)
        for number in range(val):
            write_image(root / "val" / name / f"ILSVRC2012_val_{10 * number + label:08d}.JPEG", 7000 + label)
    return root
