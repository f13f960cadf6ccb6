"""COCO 2014 in the split of Karpathy and Fei-Fei, for image-text retrieval."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from common.data.annotations import (
    CaptionedImages,
    ImageAnnotations,
    LanguageCaptions,
    captioned_images,
    read_json,
    read_once,
    single_spaced,
)
from common.data.datasets.base import IMAGE_SUFFIXES, DatasetStatus, Scan, walk, write_json
from common.data.datasets.captioned import LanguageCaptioned
from common.data.datasets.coco import PER_IMAGE, Annotated, coco_name, fill_scan
from common.data.listing import DatasetError, DatasetMissing, Listing
from common.data.sequences import Rows, Texts
from common.files import parsing

_LIST = "dataset_coco.json"


class COCOKarpathy(LanguageCaptioned):
    """COCO 2014 in Karpathy's split, which moves most official validation images ("restval") to training.

    Args:
        restval: whether `train` includes `restval`, which makes 113,287 images.
        regions: folder of region features; None = `regions` in the root.

    Source: docs/papers/mct.md [9], "Cross-modal search"; docs/papers/m3p.md [8].
    """

    languages = ("en",)
    official_regions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("coco_train_no_dist.h5",),
        "val": ("coco_val.h5",),
        "test": ("coco_test5k.h5", "coco_test1k.h5"),
    }

    name = "coco_karpathy"
    title = "COCO 2014, Karpathy's split"
    splits = ("train", "restval", "val", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val"}
    optional_splits = frozenset({"restval"})
    published_counts: ClassVar[Mapping[str, int]] = {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000}
    expected_layout = (
        "dataset_coco.json                              (Karpathy's file)\n"
        "train2014/COCO_train2014_<image id:012d>.jpg   (train)\n"
        "val2014/COCO_val2014_<image id:012d>.jpg       (restval, val and test)"
    )
    size = "20 GB"
    license = "annotations CC BY 4.0; the images belong to their Flickr authors"
    source = (
        "https://cocodataset.org/#download (2014 images) and caption_datasets.zip of "
        "https://cs.stanford.edu/people/karpathy/deepimagesent"
    )

    def __init__(self, root: str | Path, restval: bool = False, regions: str | os.PathLike[str] | None = None) -> None:
        super().__init__(root, regions)
        self.restval = restval

    def published_count(self, split: str, fold: int | None = None) -> int | None:
        restval = self.published_counts["restval"] if self.restval and split == "train" else 0
        return self.published_counts[split] + restval

    def annotations(self, split: str, listing: Listing | None = None) -> ImageAnnotations:
        """Return the captions of a listing's images. None means the whole split. Tags and boxes stay empty."""
        listing = self.listing(split) if listing is None else listing
        images, _ = read_splits(self._one_of(_LIST))
        return images.annotations(listing.names)

    def _captions(self, split: str, language: str) -> LanguageCaptions:
        """Return the English captions of a split's images by key, whether or not the image files exist."""
        images, rows = self._images(split)
        kept = rows[np.diff(images.captions.starts)[rows] > 0]
        if not len(kept):
            raise self._lacks(self.root / _LIST, f"no image of split {split!r} has a caption")
        keys = Texts(_key(images.names[row]) for row in kept)
        texts = Rows.texts(tuple(map(single_spaced, images.captions[row])) for row in kept)
        return LanguageCaptions("en", keys, texts, images.groups[kept])

    def images(self, split: str) -> tuple[list[str], list[int], list[int]]:
        """Return keys, COCO numbers and groups of a split's images, in list order."""
        images, rows = self._images(self._checked(split, None)[0])
        return [_key(images.names[row]) for row in rows], images.image_ids[rows].tolist(), images.groups[rows].tolist()

    def region_paths(self, split: str) -> tuple[Path, ...]:
        """Return a split's region files. Training with `restval` needs all, because restval images are in val2014."""
        several = self.restval and split == "train" and self.regions_root is None
        return self.all_region_paths() if several else super().region_paths(split)

    def all_region_paths(self) -> tuple[Path, ...]:
        """Return the region feature files of all splits."""
        paths_of = super().region_paths
        rest = ["restval"] if any(self.regions_folder.glob("restval[._]*")) else []  # else `*` would match
        return tuple(dict.fromkeys(path for split in ("train", *rest, "val", "test") for path in paths_of(split)))

    def has_list(self) -> bool:
        return (self.root / _LIST).exists()

    def image_path(self, key: str, split: str = "train") -> Path:
        return self.root / key.removeprefix("COCO_").partition("_")[0] / f"{key}.jpg"

    def status(self) -> DatasetStatus:
        """Report the status. Counts images, or captions if there are region features but no images."""
        status, splits = super().status(), ("train", "val", "test")
        if not self.has_list():
            return status
        if not any(map(self.region_paths, splits)):
            note = f"without region features in {self.regions_folder}, which only some models need"
            return replace(status, notes=(*status.notes, note))
        notes = [note for split in splits for note in self.region_notes(split)]
        try:
            counts = {split: len(self.captions(split)) for split in splits if self.regions(split)}
        except (DatasetMissing, ValueError, OSError):  # damaged files
            counts = {}
        if status.counts or not counts:
            return replace(status, notes=(*status.notes, *notes))
        notes.append("no images; models that read region features do not need them")
        return DatasetStatus(self, "captions by image", counts, notes=tuple(notes))

    def _options(self) -> dict[str, object]:
        return {"restval": self.restval}

    def _scan(self, split: str, fold: int | None) -> Scan:
        images, rows = self._images(split)
        folders = sorted({images.names[row].partition("/")[0] for row in rows})
        present = [name for name in folders if (self.root / name).is_dir()]
        if folders and not present:
            raise self._lacks(self.root / folders[0])
        scan = Scan((), f"{', '.join(f'{name}/' for name in folders)} with {_LIST}", [self.root, images.path])
        files = {
            f"{name}/{file}" for name in present for file, _ in walk(self.root / name, IMAGE_SUFFIXES, scan.watched)
        }
        fill_scan(scan, images, files, rows=rows.tolist())
        return scan

    def _images(self, split: str) -> tuple[CaptionedImages, npt.NDArray[np.int64]]:
        """Return the images of all splits, and the rows that belong to one split."""
        images, splits = read_splits(self._one_of(_LIST))
        return images, np.flatnonzero((splits == split) | (self.restval and split == "train" and splits == "restval"))


def _key(name: str) -> str:
    """Return the image's key: the file name without folder and suffix."""
    return os.path.splitext(name.rpartition("/")[2])[0]


@read_once(2)
def read_splits(path: Path) -> tuple[CaptionedImages, npt.NDArray[np.str_]]:
    """Read the images of Karpathy's list, named by folder and file, and each image's split. Cached in this process."""
    with parsing(path, DatasetError):
        entries = read_json(path, without=frozenset({"tokens"}))["images"]
        images = [
            (f"{entry['filepath']}/{entry['filename']}", entry["cocoid"], entry.get("group_id", entry["cocoid"]))
            for entry in entries
        ]
        sentences = ((sentence, entry["cocoid"]) for entry in entries for sentence in entry["sentences"])
        captions = ((sentence["raw"], sentence["sentid"], number) for sentence, number in sentences)
        return captioned_images(path, images, captions), np.array([entry["split"] for entry in entries], dtype=np.str_)


# ---------------------------------------------------------------------------------------------------- writing
def write_karpathy(root: Path, parts: Mapping[str, Sequence[Annotated]]) -> None:
    """Write ``dataset_coco.json`` of Karpathy's split. `train` is in ``train2014``, all other parts in ``val2014``."""
    images: list[dict[str, Any]] = []
    for split, members in parts.items():
        for image in members:
            sentences = [
                {
                    "tokens": re.findall(r"\w+", caption.lower()),
                    "raw": caption,
                    "imgid": len(images),
                    "sentid": PER_IMAGE * image.number + n,
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
    write_json(root / _LIST, {"images": images, "dataset": "coco"})


def karpathy_folder(split: str) -> str:
    return "train2014" if split == "train" else "val2014"


def karpathy_name(number: int, split: str) -> str:
    return f"COCO_{karpathy_folder(split)}_{coco_name(number)}"
