"""COCO 2014 in the split of Karpathy and Fei-Fei, for retrieval by captions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from common.data.annotations import (
    CaptionCollector,
    CaptionedImages,
    ImageAnnotations,
    LanguageCaptions,
    entry_of,
    objects,
    read_json,
    read_once,
)
from common.data.datasets.base import IMAGE_SUFFIXES, MediaDataset, Scan, first_file, walk
from common.data.datasets.captioned import LanguageCaptioned
from common.data.datasets.coco import ARCHIVES, fill_scan
from common.data.listing import Listing
from common.data.sequences import Rows, Texts

_LISTS = ("dataset_coco.json", "annotations/dataset_coco.json", "karpathy/dataset_coco.json")
_PARENTS = ("", "images/")


class COCOKarpathy(LanguageCaptioned, MediaDataset):
    """COCO 2014 in Karpathy's split: most of the official validation images are for training here ("restval").

    Args:
        restval: whether `train` includes `restval`: 113,287 images.
        regions: folder of region features; None = `regions` in the root.

    Source: docs/papers/mct.md [9], "Cross-modal search"; of M3P, section 8.
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
    num_classes = 0
    published_counts: ClassVar[Mapping[str, int]] = {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000}
    streams = ("image",)
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
        super().__init__(root)
        self.restval = restval
        if regions is not None:
            self.regions_root = Path(regions).expanduser()

    def published_count(self, split: str, fold: int | None = None) -> int | None:
        more = self.published_counts["restval"] if self.restval and split == "train" else 0
        return self.published_counts[split] + more

    def annotations(self, split: str, listing: Listing | None = None) -> ImageAnnotations:
        """Captions of the images of a listing (None = the whole split), in its order; no tags or boxes."""
        split, _ = self._checked(split, None)
        listing = self.listing(split) if listing is None else listing
        images = self._images()[self._part_of(split)]
        names = listing.table.names()
        # Names in the list include the image folder.
        parent = next((parent for parent in _PARENTS[1:] if names and names[0].startswith(parent)), "")
        return images.annotations(images.rows_of(name.removeprefix(parent) for name in names))

    def captions(self, split: str, language: str = "en") -> LanguageCaptions:
        """English captions of a split's images by key, whether or not the files exist."""
        split, _ = self._checked(split, None)
        self._checked_language(language)
        images = self._images()[self._part_of(split)]
        kept = np.flatnonzero(np.diff(images.captions.starts)).tolist()
        if not kept:
            raise self._lacks(self.root / _LISTS[0], f"no image of split {split!r} has a caption")
        keys = Texts(_key(images.names[row]) for row in kept)
        rows = Rows.texts(tuple(" ".join(text.split()) for text in images.captions[row]) for row in kept)
        return LanguageCaptions("en", keys, rows, images.groups[kept])

    def images(self, split: str) -> tuple[list[str], list[int], list[int]]:
        """Keys, COCO numbers and groups of a split's images, in list order."""
        images = self._images()[self._part_of(self._checked(split, None)[0])]
        return [_key(name) for name in images.names], images.image_ids.tolist(), images.groups.tolist()

    def has_list(self) -> bool:
        return first_file(self.root, _LISTS) is not None

    def image_path(self, key: str, split: str = "train") -> Path:
        folder = key.removeprefix("COCO_").partition("_")[0]
        names = [self.root / parent / folder / f"{key}.jpg" for parent in _PARENTS]
        return next((path for path in names if path.is_file()), names[0])

    def _options(self) -> dict[str, object]:
        return {"restval": self.restval}

    def checksums(self) -> Mapping[str, str]:
        return {name: checksum for name, checksum in ARCHIVES.items() if name in ("train2014.zip", "val2014.zip")}

    def _scan(self, split: str, fold: int | None) -> Scan:
        images = self._images()[self._part_of(split)]
        folders = sorted({name.partition("/")[0] for name in images.names})
        parent = next(
            (parent for parent in _PARENTS if any((self.root / parent / name).is_dir() for name in folders)), None
        )
        if parent is None and folders:
            raise self._lacks(self.root / folders[0])
        parent = parent or ""
        watched = [images.path.parent, images.path, self.root / parent]
        where = ", ".join(f"{parent}{name}/" for name in folders)
        scan = Scan((), f"{where} with {images.path.relative_to(self.root)}", watched=watched)
        files: set[str] = set()
        for name in folders:
            folder = self.root / parent / name
            if folder.is_dir():
                files.update(f"{name}/{file}" for file, _ in walk(folder, IMAGE_SUFFIXES, watched))
        fill_scan(scan, images, files, parent)
        return scan

    def _part_of(self, split: str) -> str:
        return "train+restval" if split == "train" and self.restval else split

    def _images(self) -> dict[str, CaptionedImages]:
        path = first_file(self.root, _LISTS)
        if path is None:
            raise self._lacks(self.root / _LISTS[0])
        return read_splits(path)


def _key(name: str) -> str:
    """File name without folder and suffix, the key of an image everywhere."""
    return os.path.splitext(name.rpartition("/")[2])[0]


@read_once(2)
def read_splits(path: Path) -> dict[str, CaptionedImages]:
    """Images of each split and of `train+restval` in Karpathy's list, with their folder; read once per process."""
    document = read_json(path, without=frozenset({"tokens"}))
    collectors = {split: CaptionCollector(path) for split in (*COCOKarpathy.splits, "train+restval")}
    every = CaptionCollector(path)
    for entry in objects(document, "images", str(path)):
        image_id = entry_of(entry, "cocoid", int, f"{path}, images")
        where = f"{path}, image {image_id}"
        split = entry_of(entry, "split", str, where)
        if split not in COCOKarpathy.splits:
            raise ValueError(f'{where}: "split" must be one of {", ".join(COCOKarpathy.splits)}, not {split!r}')
        folder = entry_of(entry, "filepath", str, where).strip("/")
        if not folder:
            raise ValueError(f'{where}: "filepath" must name the folder of the image, such as train2014')
        name = f"{folder}/{entry_of(entry, 'filename', str, where)}"
        group = entry_of(entry, "group_id", int, where) if "group_id" in entry else image_id
        sentences = [
            (entry_of(sentence, "raw", str, where), entry_of(sentence, "sentid", int, where))
            for sentence in objects(entry, "sentences", where)
        ]
        # `every` finds what occurs twice, also in two splits.
        for collector in (
            every,
            collectors[split],
            *([collectors["train+restval"]] if split in ("train", "restval") else []),
        ):
            collector.add_image(name, image_id, group)
            for text, number in sentences:
                collector.add_caption(text, number, image_id)
    return {split: collector.finish() for split, collector in collectors.items()}
