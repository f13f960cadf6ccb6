"""COCO: captions and instances."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from common.data.annotations import (
    Boxes,
    CaptionedImages,
    ImageAnnotations,
    captioned_images,
    kept_columns,
    read_json,
    read_once,
)
from common.data.datasets.base import IMAGE_SUFFIXES, MediaDataset, Scan, walk, write_json
from common.data.listing import DatasetError, Listing
from common.files import parsing

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

    A listing contains the images that have captions. Tags are the categories of the instances, in file order. Images
    with the same optional ``group_id`` show the same thing.

    Source: docs/papers/mct.md [8].
    """

    #: Part of folder and file names.
    year: ClassVar[str] = "2017"
    name = "coco"
    title = "COCO 2017"
    splits = ("train", "val")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val"}
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

    def annotations(self, split: str, listing: Listing | None = None) -> ImageAnnotations:
        """Return captions, tags and boxes of the images in a listing, in that order. None means the whole split."""
        split, _ = self._checked(split, None)
        listing = self.listing(split) if listing is None else listing
        images = self._captions(split)
        annotations = images.annotations(name.removeprefix(f"{split}{self.year}/") for name in listing.names)
        path = self._instances_path(split)
        if not path.is_file():
            return annotations
        instances = read_instances(path)
        tags, boxes = instances.tags(annotations.image_ids), functools.partial(boxes_of, path, annotations.image_ids)
        return replace(annotations, tags=tags, tag_names=instances.categories, read_boxes=boxes)

    def _scan(self, split: str, fold: int | None) -> Scan:
        folder = self._one_of(f"{split}{self.year}")
        images = self._captions(split)
        instances = self._instances_path(split)
        prefix = f"{folder.name}/"
        scan = Scan((), f"{prefix} with {images.path.relative_to(self.root)}", [images.path.parent, images.path])
        fill_scan(scan, images, {name for name, _ in walk(folder, IMAGE_SUFFIXES, scan.watched)}, prefix)
        if not instances.is_file():
            scan.notes.append(f"{instances.relative_to(self.root)} is missing: the images have no tags and no boxes")
        return scan

    def _captions(self, split: str) -> CaptionedImages:
        return read_captions(self._one_of(f"annotations/captions_{split}{self.year}.json"))

    def _instances_path(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{split}{self.year}.json"


def fill_scan(
    scan: Scan, images: CaptionedImages, files: set[str], prefix: str = "", rows: Iterable[int] | None = None
) -> None:
    """Add images that have captions to a scan. Images without a file count as missing.

    `files` are the existing files, named as in the annotations. `prefix` is the folder's path from the root.
    """
    rows = range(len(images.names)) if rows is None else rows
    lengths = np.diff(images.captions.starts)
    with_captions = [row for row in rows if lengths[row]]
    for row in with_captions:
        name = images.names[row]
        scan.add(prefix + name if name in files else None, prefix + name)
    without = len([*rows]) - len(with_captions)
    if without:
        scan.notes.append(f"{without:,} images without a caption are left out")


# ---------------------------------------------------------------------------------------------------- captions
@read_once()
def read_captions(path: Path) -> CaptionedImages:
    with parsing(path, DatasetError):
        document = read_json(path)
        images = ((str(item["file_name"]), item["id"], item.get("group_id", item["id"])) for item in document["images"])
        captions = ((entry["caption"], entry["id"], entry["image_id"]) for entry in document["annotations"])
        return captioned_images(path, images, captions)


# ---------------------------------------------------------------------------------------------------- instances
@dataclass(frozen=True, eq=False)
class Instances:
    """The M objects of an annotation file as columns, in the order of the file.

    Args:
        labels: indices into `categories`, int64 [M].
        boxes: left, top, right, bottom, float32 [M, 4].
    """

    categories: tuple[str, ...]
    image_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    crowd: npt.NDArray[np.bool_]

    def tags(self, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which categories each image shows, bool [N, categories]. Crowds count, too."""
        tags = np.zeros((len(image_ids), len(self.categories)), dtype=np.bool_)
        for row, positions in enumerate(self.by_image(image_ids)):
            tags[row, self.labels[positions]] = True
        return tags

    def by_image(self, image_ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Return the positions of each image's objects, in file order."""
        order = np.argsort(self.image_ids, kind="stable")
        ordered = self.image_ids[order]
        starts, ends = (np.searchsorted(ordered, image_ids, side) for side in ("left", "right"))
        return [order[start:end] for start, end in zip(starts.tolist(), ends.tolist())]


@read_once()
def read_instances(path: Path) -> Instances:
    columns = kept_columns(path, _instance_columns)
    return Instances(**{**columns, "categories": tuple(columns["categories"].tolist())})  # type: ignore[arg-type]


def _instance_columns(path: Path) -> dict[str, npt.NDArray[Any]]:
    with parsing(path, DatasetError):
        document = read_json(path, without=frozenset({"segmentation"}))
        label_of = {entry["id"]: label for label, entry in enumerate(document["categories"])}
        objects = document["annotations"]
        strangers = {entry["image_id"] for entry in objects} - {entry["id"] for entry in document["images"]}
        if strangers:
            raise DatasetError(f"{path}: an object belongs to image {min(strangers)}, which the file does not list")
        boxes = np.array([entry["bbox"] for entry in objects]).reshape(len(objects), 4)
        boxes[:, 2:] += boxes[:, :2]
        return {
            "categories": np.array([entry["name"] for entry in document["categories"]], dtype=np.str_),
            "image_ids": np.array([entry["image_id"] for entry in objects], dtype=np.int64),
            "labels": np.array([label_of[entry["category_id"]] for entry in objects], dtype=np.int64),
            "boxes": boxes.astype(np.float32),
            "crowd": np.array([entry.get("iscrowd", 0) for entry in objects], dtype=np.bool_),
        }


def boxes_of(path: Path, image_ids: npt.NDArray[np.int64]) -> list[Boxes]:
    """Read the boxes of some images from an instance file, and leave out empty boxes."""
    instances = read_instances(path)
    solid = np.all(instances.boxes[:, 2:] > instances.boxes[:, :2], axis=1)
    boxes: list[Boxes] = []
    for positions in instances.by_image(image_ids):
        positions = positions[solid[positions]]
        boxes.append(
            {
                "boxes": instances.boxes[positions],
                "labels": instances.labels[positions],
                "iscrowd": instances.crowd[positions],
            }
        )
    return boxes


# ---------------------------------------------------------------------------------------------------- writing
# The id of a caption or object is the picture's id and two digits, so it is unique over all splits.
PER_IMAGE = 100


@dataclass(frozen=True)
class Instance:
    """An object: `category` from 0; box (left, top, right, bottom), area and polygon [points, 2] are in pixels."""

    category: int
    box: tuple[float, float, float, float]
    area: float
    polygon: np.ndarray
    difficult: bool = False


@dataclass(frozen=True)
class Annotated:
    """A picture with annotations. `number` is unique over all splits. Pictures of the same thing share a `group`."""

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
    """Metadata of a data set; `categories` are pairs of name and supercategory."""

    description: str
    categories: tuple[tuple[str, str], ...]
    licenses: tuple[str, ...]


def coco_name(number: int) -> str:
    return f"{number:012d}.jpg"


def write_coco(root: Path, split: str, images: Sequence[Annotated], vocabulary: Vocabulary) -> None:
    """Write ``annotations/captions_<split>.json`` and ``instances_<split>.json`` of a split such as `train2017`."""
    for image in images:
        if max(len(image.captions), len(image.instances)) >= PER_IMAGE:
            raise ValueError(f"{image.file_name}: at most {PER_IMAGE - 1} captions and objects per picture")
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
        "images": [coco_image(image) for image in images],
    }
    objects = [
        _coco_object(image.number, n, instance) for image in images for n, instance in enumerate(image.instances, 1)
    ]
    categories = [
        {"supercategory": general, "id": n, "name": name} for n, (name, general) in enumerate(vocabulary.categories, 1)
    ]
    folder = root / "annotations"
    write_json(folder / f"captions_{split}.json", {**head, "annotations": coco_captions(images)})
    write_json(folder / f"instances_{split}.json", {**head, "annotations": objects, "categories": categories})


def coco_image(image: Annotated) -> dict[str, Any]:
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


def coco_captions(images: Iterable[Annotated]) -> list[dict[str, Any]]:
    return [
        {"image_id": image.number, "id": PER_IMAGE * image.number + n, "caption": caption}
        for image in images
        for n, caption in enumerate(image.captions, 1)
    ]


def _coco_object(image: int, number: int, instance: Instance) -> dict[str, Any]:
    left, top, right, bottom = instance.box
    return {
        "segmentation": [[round(float(value), 2) for value in instance.polygon.reshape(-1)]],
        "area": round(float(instance.area), 2),
        "iscrowd": 0,
        "image_id": image,
        "bbox": [round(float(value), 2) for value in (left, top, right - left, bottom - top)],
        "category_id": instance.category + 1,
        "id": PER_IMAGE * image + number,
    }
