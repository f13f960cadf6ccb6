"""COCO: captions and instances."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from common.data.annotations import (
    Boxes,
    CaptionCollector,
    CaptionedImages,
    ImageAnnotations,
    entry_of,
    kept_columns,
    objects,
    read_json,
    read_once,
)
from common.data.datasets.base import IMAGE_SUFFIXES, MediaDataset, Scan, first_folder, prefix_of, walk
from common.data.listing import Listing

#: Archives of the images and annotations, as TensorFlow Datasets recorded them.
ARCHIVES = {
    "train2014.zip": "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    "val2014.zip": "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
    "annotations_trainval2014.zip": "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
    "train2017.zip": "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    "val2017.zip": "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    "annotations_trainval2017.zip": "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
}

#: The 80 classes of COCO's detection task, by category id.
CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


class COCO(MediaDataset):
    """COCO 2017: photographs with five captions each, and the outlines of objects of 80 categories.

    A listing has the images with captions. Tags are the categories of the instances, in file order. Images with the
    same optional ``group_id`` show the same thing.

    Source: docs/papers/mct.md [8].
    """

    #: Part of folder and file names.
    year: ClassVar[str] = "2017"
    name = "coco"
    title = "COCO 2017"
    splits = ("train", "val")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val"}
    num_classes = 0
    published_counts: ClassVar[Mapping[str, int]] = {"train": 118_287, "val": 5_000}
    streams = ("image",)
    expected_layout = (
        "train2017/<image id:012d>.jpg and val2017/...\n"
        "annotations/captions_train2017.json and captions_val2017.json\n"
        "annotations/instances_train2017.json and instances_val2017.json   (tags and boxes; optional for captions)"
    )
    size = "20 GB"
    license = "annotations CC BY 4.0; the images belong to their Flickr authors"
    source = "https://cocodataset.org/#download"
    prepares = "index of the files and of the instances; decoding of a random sample"

    def annotations(self, split: str, listing: Listing | None = None) -> ImageAnnotations:
        """Captions, tags and boxes of the images of a listing (None = the whole split), in its order."""
        split, _ = self._checked(split, None)
        listing = self.listing(split) if listing is None else listing
        images = self._captions(split)
        prefix = prefix_of(self._folder(split), self.root)
        rows = images.rows_of(name.removeprefix(prefix) for name in listing.table.names())
        path = self._instances_path(split)
        if not path.is_file():
            return images.annotations(rows)
        instances = read_instances(path)
        ids = images.image_ids[rows]
        read_boxes = functools.partial(boxes_of, path, ids)
        return images.annotations(rows, instances.tags(ids), instances.categories, read_boxes)

    def checksums(self) -> Mapping[str, str]:
        return {name: checksum for name, checksum in ARCHIVES.items() if self.year in name}

    def index(self, split: str, fold: int | None = None) -> tuple[Listing, bool]:
        split, _ = self._checked(split, fold)
        path = self._instances_path(split)
        if path.is_file():
            read_instances(path)
        return super().index(split)

    def _scan(self, split: str, fold: int | None) -> Scan:
        folder = self._folder(split)
        images = self._captions(split)
        instances = self._instances_path(split)
        watched = [images.path.parent, images.path]
        scan = Scan((), f"{prefix_of(folder, self.root)} with {images.path.relative_to(self.root)}", watched=watched)
        files = {name for name, _ in walk(folder, IMAGE_SUFFIXES, watched)}
        fill_scan(scan, images, files, prefix_of(folder, self.root))
        if not instances.is_file():
            scan.notes.append(f"{instances.relative_to(self.root)} is missing: the images have no tags and no boxes")
        return scan

    def _folder(self, split: str) -> Path:
        name = f"{split}{self.year}"
        folder = first_folder(self.root, (name, f"images/{name}"))
        if folder is None:
            raise self._lacks(self.root / name)
        return folder

    def _captions(self, split: str) -> CaptionedImages:
        path = self.root / "annotations" / f"captions_{split}{self.year}.json"
        if not path.is_file():
            raise self._lacks(path)
        return read_captions(path)

    def _instances_path(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{split}{self.year}.json"


def fill_scan(scan: Scan, images: CaptionedImages, files: set[str], prefix: str = "") -> None:
    """Add the images with captions and a file to a scan; count the others as missing.

    Args:
        files: existing file names, as spelled in the annotations.
        prefix: makes a name relative to the root.
    """
    lengths = np.diff(images.captions.starts).tolist()
    for name, length in zip(images.names, lengths):
        if not length:
            continue
        if name in files:
            scan.names.append(prefix + name)
        else:
            scan.missing_names.append(prefix + name)
    scan.labels = [-1] * len(scan.names)
    without = lengths.count(0)
    if without:
        scan.notes.append(f"{without:,} images without a caption are left out")


# ---------------------------------------------------------------------------------------------------- captions
@read_once()
def read_captions(path: Path) -> CaptionedImages:
    """Read a COCO caption file, once per process."""
    document = read_json(path)
    collector = CaptionCollector(path)
    for entry in objects(document, "images", str(path)):
        image_id = entry_of(entry, "id", int, f"{path}, images")
        name = entry_of(entry, "file_name", str, f"{path}, image {image_id}")
        group = entry_of(entry, "group_id", int, f"{path}, image {image_id}") if "group_id" in entry else image_id
        collector.add_image(name, image_id, group)
    for entry in objects(document, "annotations", str(path)):
        caption_id = entry_of(entry, "id", int, f"{path}, annotations")
        where = f"{path}, annotation {caption_id}"
        if "caption" not in entry:
            raise ValueError(f'{where}: no "caption"; this is not a file of captions, such as captions_train2017.json')
        image_id = entry_of(entry, "image_id", int, where)
        collector.add_caption(entry_of(entry, "caption", str, where), caption_id, image_id)
    return collector.finish()


# ---------------------------------------------------------------------------------------------------- instances
@dataclass(frozen=True, eq=False)
class Instances:
    """The M objects of an annotation file as columns, in its order.

    Args:
        categories: names, in file order.
        image_ids: int64 [M].
        labels: positions in `categories`, int64 [M].
        boxes: left, top, right, bottom, float32 [M, 4].
        crowd: whether it is a crowd, bool [M].
    """

    categories: tuple[str, ...]
    image_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    crowd: npt.NDArray[np.bool_]

    def tags(self, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Categories in each image, bool [N, categories]; crowds count."""
        tags = np.zeros((len(image_ids), len(self.categories)), dtype=np.bool_)
        for row, positions in enumerate(self.by_image(image_ids)):
            tags[row, self.labels[positions]] = True
        return tags

    def by_image(self, image_ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Positions of the objects of each image, in file order."""
        order = np.argsort(self.image_ids, kind="stable")
        ordered = self.image_ids[order]
        starts, ends = (np.searchsorted(ordered, image_ids, side) for side in ("left", "right"))
        return [order[start:end] for start, end in zip(starts.tolist(), ends.tolist())]


@read_once()
def read_instances(path: Path) -> Instances:
    """Read a COCO instance file, once per process; columns of large ones are cached on disk."""
    columns = kept_columns(path, functools.partial(_instance_columns, path))
    return Instances(
        tuple(columns["categories"].tolist()),
        columns["image_ids"],
        columns["labels"],
        columns["boxes"],
        columns["crowd"],
    )


def _instance_columns(path: Path) -> dict[str, npt.NDArray[Any]]:
    document = read_json(path, without=frozenset({"segmentation"}))
    label_of, names = _categories(document, path)
    images = {entry_of(entry, "id", int, f"{path}, images") for entry in objects(document, "images", str(path))}
    image_ids: list[int] = []
    labels: list[int] = []
    boxes: list[list[float]] = []
    crowd: list[bool] = []
    for entry in objects(document, "annotations", str(path)):
        where = f"{path}, annotation {entry.get('id')}"
        image_ids.append(entry_of(entry, "image_id", int, where))
        if image_ids[-1] not in images:
            raise ValueError(f"{where}: it is of image {image_ids[-1]}, which the file does not list")
        category = entry_of(entry, "category_id", int, where)
        if category not in label_of:
            raise ValueError(f"{where}: category_id {category} is not among the file's categories")
        labels.append(label_of[category])
        boxes.append(_box(entry, where))
        crowd.append(bool(entry.get("iscrowd", 0)))
    return {
        "categories": np.array(names, dtype=np.str_),
        "image_ids": np.array(image_ids, dtype=np.int64),
        "labels": np.array(labels, dtype=np.int64),
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "crowd": np.array(crowd, dtype=np.bool_),
    }


def _categories(document: Mapping[str, Any], path: Path) -> tuple[dict[int, int], list[str]]:
    """Consecutive index of each category id, and the names, in file order."""
    label_of: dict[int, int] = {}
    names: list[str] = []
    for entry in objects(document, "categories", str(path)):
        category = entry_of(entry, "id", int, f"{path}, categories")
        name = entry_of(entry, "name", str, f"{path}, category {category}")
        if category in label_of or name in names:
            raise ValueError(f"{path}: category {category} ({name!r}) occurs twice")
        label_of[category] = len(names)
        names.append(name)
    return label_of, names


def _box(entry: Mapping[str, Any], where: str) -> list[float]:
    found = entry.get("bbox")
    if (
        not isinstance(found, list)
        or len(found) != 4
        or not all(isinstance(number, int | float) and np.isfinite(number) for number in found)
    ):
        raise ValueError(f'{where}: "bbox" must be left, top, width and height, not {found}')
    left, top, width, height = map(float, found)
    return [left, top, left + width, top + height]


def boxes_of(path: Path, image_ids: npt.NDArray[np.int64]) -> list[Boxes]:
    """Boxes of some images from an instance file, without empty ones."""
    instances = read_instances(path)
    solid = np.all(instances.boxes[:, 2:] > instances.boxes[:, :2], axis=1)
    found: list[Boxes] = []
    for positions in instances.by_image(image_ids):
        positions = positions[solid[positions]]
        found.append(
            {
                "boxes": instances.boxes[positions],
                "labels": instances.labels[positions],
                "iscrowd": instances.crowd[positions],
            }
        )
    return found
