"""Write captioned and labeled picture sets in the layouts in which the real sets are distributed."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

# Ids of captions and objects, unique over all splits: the picture's id, then two digits.
_PER_IMAGE = 100


@dataclass(frozen=True)
class Instance:
    """One object of a picture: category from 0; box (left, top, right, bottom), area, polygon [points, 2] in pixels."""

    category: int
    box: tuple[float, float, float, float]
    area: float
    polygon: np.ndarray
    difficult: bool = False


@dataclass(frozen=True)
class Annotated:
    """One picture and its annotations; `number` is unique over all splits, pictures of the same thing share `group`."""

    number: int
    file_name: str
    width: int
    height: int
    captions: tuple[str, ...] = ()
    instances: tuple[Instance, ...] = ()
    group: int | None = None
    license: int = 0


@dataclass(frozen=True)
class Vocabulary:
    """Metadata of a set; `categories` are pairs of name and supercategory."""

    description: str
    categories: tuple[tuple[str, str], ...]
    licenses: tuple[str, ...]


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] with full color resolution, because glyphs are only a few pixels wide."""
    Image.fromarray(image).save(path, "JPEG", quality=95, subsampling=0)


def coco_name(number: int) -> str:
    return f"{number:012d}.jpg"


# ---------------------------------------------------------------------------------------------------------------- COCO
def write_coco(root: Path, split: str, images: Sequence[Annotated], vocabulary: Vocabulary) -> None:
    """Write ``annotations/captions_<split>.json`` and ``instances_<split>.json``; `split` is, e.g., `train2017`."""
    for image in images:
        if max(len(image.captions), len(image.instances)) >= _PER_IMAGE:
            raise ValueError(f"{image.file_name}: at most {_PER_IMAGE - 1} captions and objects per picture")
    head = {
        "info": {
            "description": vocabulary.description,
            "url": "",
            "version": "1.0",
            "year": 2021,
            "contributor": "",
            "date_created": "2021/01/01",
        },
        "licenses": [{"url": "", "id": n, "name": name} for n, name in enumerate(vocabulary.licenses, 1)],
        "images": [_coco_image(image) for image in images],
    }
    captions = [
        {"image_id": image.number, "id": _PER_IMAGE * image.number + n, "caption": caption}
        for image in images
        for n, caption in enumerate(image.captions, 1)
    ]
    objects = [
        _coco_object(image.number, n, instance) for image in images for n, instance in enumerate(image.instances, 1)
    ]
    categories = [
        {"supercategory": general, "id": n, "name": name} for n, (name, general) in enumerate(vocabulary.categories, 1)
    ]
    folder = root / "annotations"
    folder.mkdir(exist_ok=True)
    _dump(folder / f"captions_{split}.json", {**head, "annotations": captions})
    _dump(folder / f"instances_{split}.json", {**head, "annotations": objects, "categories": categories})


def _coco_image(image: Annotated) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "license": image.license + 1,
        "file_name": image.file_name,
        "coco_url": "",
        "height": image.height,
        "width": image.width,
        "date_captured": "2021-01-01 00:00:00",
        "flickr_url": "",
        "id": image.number,
    }
    return entry if image.group is None else {**entry, "group_id": image.group}


def _coco_object(image: int, number: int, instance: Instance) -> dict[str, Any]:
    left, top, right, bottom = instance.box
    return {
        "segmentation": [[round(float(value), 2) for value in instance.polygon.reshape(-1)]],
        "area": round(float(instance.area), 2),
        "iscrowd": 0,
        "image_id": image,
        "bbox": [round(float(value), 2) for value in (left, top, right - left, bottom - top)],
        "category_id": instance.category + 1,
        "id": _PER_IMAGE * image + number,
    }


def write_karpathy(root: Path, parts: Mapping[str, Sequence[Annotated]]) -> None:
    """Write ``dataset_coco.json`` of Karpathy's split: `train` is in ``train2014``, all other parts in ``val2014``."""
    images: list[dict[str, Any]] = []
    for split, members in parts.items():
        for image in members:
            sentences = [
                {
                    "tokens": re.findall(r"\w+", caption.lower()),
                    "raw": caption,
                    "imgid": len(images),
                    "sentid": _PER_IMAGE * image.number + n,
                }
                for n, caption in enumerate(image.captions, 1)
            ]
            entry = {
                "filepath": karpathy_folder(split),
                "sentids": [sentence["sentid"] for sentence in sentences],
                "filename": image.file_name,
                "imgid": len(images),
                "split": split,
                "sentences": sentences,
                "cocoid": image.number,
            }
            images.append(entry if image.group is None else {**entry, "group_id": image.group})
    _dump(root / "dataset_coco.json", {"images": images, "dataset": "coco"})


def karpathy_folder(split: str) -> str:
    return "train2014" if split == "train" else "val2014"


def karpathy_name(number: int, split: str) -> str:
    return f"COCO_{karpathy_folder(split)}_{coco_name(number)}"


# ----------------------------------------------------------------------------------------------------------------- VOC
def write_voc(
    folder: Path, images: Sequence[Annotated], classes: Sequence[str], parts: Mapping[str, Sequence[int]]
) -> None:
    """Write ``Annotations`` and ``ImageSets/Main`` of a year of Pascal VOC; `parts` maps lists to rows."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for image in images:
        tree = ElementTree.ElementTree(_voc_annotation(image, folder.name, classes))
        ElementTree.indent(tree, "\t")
        tree.write(folder / "Annotations" / f"{Path(image.file_name).stem}.xml", encoding="utf-8")
    lists = folder / "ImageSets" / "Main"
    for part, rows in parts.items():
        stems = [Path(images[row].file_name).stem for row in rows]
        write_lines(lists / f"{part}.txt", stems)
        for number, name in enumerate(classes):
            lines = (f"{stem} {_voc_flag(images[row], number):2d}" for stem, row in zip(stems, rows))
            write_lines(lists / f"{name}_{part}.txt", lines)


def _voc_flag(image: Annotated, category: int) -> int:
    """1: shown; 0: only difficult instances; -1: not shown."""
    own = [instance for instance in image.instances if instance.category == category]
    if not own:
        return -1
    return 0 if all(instance.difficult for instance in own) else 1


def _voc_annotation(image: Annotated, folder: str, classes: Sequence[str]) -> ElementTree.Element:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **texts: object) -> None:
        for tag, text in texts.items():
            ElementTree.SubElement(parent, tag).text = str(text)

    add(root, folder=folder, filename=image.file_name)
    add(ElementTree.SubElement(root, "source"), database="generated", annotation="generated", image="generated")
    add(ElementTree.SubElement(root, "size"), width=image.width, height=image.height, depth=3)
    add(root, segmented=0)
    for instance in image.instances:
        entry = ElementTree.SubElement(root, "object")
        add(entry, name=classes[instance.category], pose="Unspecified", truncated=0)
        add(entry, difficult=int(instance.difficult))
        left, top, right, bottom = instance.box
        # Pixels count from 1, and the box includes the last one.
        add(
            ElementTree.SubElement(entry, "bndbox"),
            xmin=max(1, math.floor(left) + 1),
            ymin=max(1, math.floor(top) + 1),
            xmax=min(image.width, math.ceil(right)),
            ymax=min(image.height, math.ceil(bottom)),
        )
    return root


# ------------------------------------------------------------------------------------------------------------ ImageNet
def imagenet_class(number: int) -> str:
    """Class folder in the form of a WordNet ID, above the range of real IDs."""
    return f"n9{number:07d}"


def imagenet_path(root: Path, split: str, label: int, number: int) -> Path:
    """Path of picture `number` (from 1) in `train` or `val`."""
    folder = imagenet_class(label)
    stem = f"{folder}_{number}" if split == "train" else f"ILSVRC2012_val_{number:08d}"
    return root / split / folder / f"{stem}.JPEG"


def write_class_names(root: Path, names: Sequence[str]) -> None:
    """Write ``LOC_synset_mapping.txt``, which names the class folders."""
    lines = (f"{imagenet_class(number)} {name}" for number, name in enumerate(names))
    write_lines(root / "LOC_synset_mapping.txt", lines)


# ------------------------------------------------------------------------------------------------ captions by language
def write_conceptual_captions(root: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Write the lists of Conceptual Captions; row n is `training/<n>.jpg` or `validation/<n>.jpg`."""
    names = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
    for part, captions in parts.items():
        folder = conceptual_captions_folder(part)
        write_lines(
            root / names[part], (f"{text}\thttp://example.org/{folder}/{row}.jpg" for row, text in enumerate(captions))
        )


def conceptual_captions_folder(split: str) -> str:
    return "training" if split == "train" else "validation"


def write_multi30k(
    root: Path, split: str, stems: Sequence[str], captions: Mapping[str, Sequence[Sequence[str]]]
) -> None:
    """Write one split of Multi30K: five captions per image in `en` and `de`, one in the others."""
    task1, task2 = (split, split) if split != "test" else ("test_2016_flickr", "test_2016")
    home = root / "data"
    for folder in ("task1/raw", "task2/raw"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    write_lines(home / f"task1/image_splits/{task1}.txt", (f"{stem}.jpg" for stem in stems))
    for language, rows in captions.items():
        for number, texts in enumerate(zip(*rows), 1):
            name = (
                f"task2/raw/{task2}.{number}.{language}.gz" if len(rows[0]) > 1 else f"task1/raw/{task1}.{language}.gz"
            )
            # Without a time stamp, the same text gives the same file.
            packed = gzip.compress("".join(f"{text}\n" for text in texts).encode(), mtime=0)
            (home / name).write_bytes(packed)


def write_stair_captions(root: Path, parts: Mapping[str, Sequence[Annotated]], description: str) -> None:
    """Write `stair_captions_v1.2_{train,val}.json` from the parts `train2014` and `val2014`."""
    for part, images in parts.items():
        captions = [
            {"image_id": image.number, "id": _PER_IMAGE * image.number + n, "caption": caption}
            for image in images
            for n, caption in enumerate(image.captions, 1)
        ]
        document = {
            "info": {"description": description, "version": "1.2", "year": 2018},
            "licenses": [],
            "images": [_coco_image(image) for image in images],
            "annotations": captions,
        }
        _dump(root / f"stair_captions_v1.2_{part.removesuffix('2014')}.json", document)


def write_coco_cn(root: Path, parts: Mapping[str, Sequence[tuple[str, Sequence[str]]]]) -> None:
    """Write COCO-CN; each part is a list of image name without suffix and captions."""
    home = root / "coco-cn-version1805v1.1"
    for part, images in parts.items():
        write_lines(home / f"coco-cn_{part}.txt", (stem for stem, _ in images))
    lines = (
        f"{stem}#{number}\t{text}"
        for images in parts.values()
        for stem, texts in images
        for number, text in enumerate(texts)
    )
    write_lines(home / "imageid.human-written-caption.txt", lines)


def write_groups(root: Path, groups: Mapping[str, Mapping[str, int]]) -> None:
    """Write ``groups.json`` (split -> key -> what the image shows), which only miniatures have."""
    _dump(root / "groups.json", groups)


def write_lines(path: Path, lines: Iterable[str], newline: str = "\n") -> None:
    """Write a text file and create its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}{newline}" for line in lines), encoding="utf-8", newline="")


def _dump(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
