"""Localized Narratives: long spoken descriptions of images of COCO 2017 and Open Images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from common.data.annotations import (
    CaptionedImages,
    ImageAnnotations,
    captioned_images,
    kept_columns,
    read_json_lines,
    read_once,
)
from common.data.datasets.base import IMAGE_SUFFIXES, MediaDataset, Scan, walk, write_lines
from common.data.datasets.coco import fill_scan
from common.data.listing import DatasetError, Listing
from common.data.sequences import Texts
from common.files import parsing

_FOLDERS = ("", "annotations/", "localized_narratives/")


class LocalizedNarratives(MediaDataset):
    """Base of images with spoken descriptions, one or more per image.

    A listing contains images that have a narrative and a file. Mouse traces, word timings and recordings are not read.

    Source: docs/papers/xmc_gan.md [7].
    """

    streams = ("image",)
    license = "narratives CC BY 4.0; the images belong to their authors"
    source = "https://google.github.io/localized-narratives"
    #: Name of each split's narrative files, and below its image folder.
    files: ClassVar[Mapping[str, str]]
    folders: ClassVar[Mapping[str, str]]
    #: Published number of narratives per split.
    published_narratives: ClassVar[Mapping[str, int]] = {}
    #: File names are image ids, padded with zeros to this length.
    id_digits: ClassVar[int] = 0

    def annotations(self, split: str, listing: Listing | None = None) -> ImageAnnotations:
        """Return the narratives of a listing's images as captions, in the same order. None means the whole split."""
        split, _ = self._checked(split, None)
        listing = self.listing(split) if listing is None else listing
        images = self._narratives(split)
        prefix = f"{self.folders[split]}/"
        return images.annotations(name.removeprefix(prefix) for name in listing.names)

    def _scan(self, split: str, fold: int | None) -> Scan:
        folder, paths = self._one_of(self.folders[split]), self._paths(split)
        images = self._narratives(split)
        prefix = f"{folder.name}/"
        scan = Scan((), f"{prefix} with {paths[0].relative_to(self.root)}", [paths[0].parent, *paths])
        fill_scan(scan, images, {name for name, _ in walk(folder, IMAGE_SUFFIXES, scan.watched)}, prefix)
        narratives, published = int(images.captions.starts[-1]), self.published_narratives.get(split)
        stated = f", published {published:,}" if published not in (None, narratives) else ""
        scan.notes.append(f"{narratives:,} narratives{stated}")
        return scan

    def _paths(self, split: str) -> list[Path]:
        stem = self.files[split]
        for folder in (self.root / name for name in _FOLDERS):
            paths = sorted(folder.glob(f"{stem}.jsonl")) or sorted(folder.glob(f"{stem}-?????-of-?????.jsonl"))
            if not paths:
                continue
            total = int(paths[0].stem[-5:]) if paths[0].stem != stem else 1
            if len(paths) < total:
                raise self._lacks(folder, f"{total - len(paths)} of {total} parts of {stem} are missing")
            return paths
        raise self._lacks(self.root / f"{stem}.jsonl")

    def _narratives(self, split: str) -> CaptionedImages:
        return read_narratives(tuple(self._paths(split)), self.id_digits)


class LocalizedNarrativesCOCO(LocalizedNarratives):
    """LN-COCO: narratives of COCO 2017, 134,272 for training, 8,573 to validate. Source: docs/papers/xmc_gan.md [7]."""

    name = "ln_coco"
    title = "Localized Narratives, COCO 2017"
    splits = ("train", "val")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val"}
    published_counts: ClassVar[Mapping[str, int]] = {"val": 5_000}
    published_narratives: ClassVar[Mapping[str, int]] = {"train": 134_272, "val": 8_573}
    files: ClassVar[Mapping[str, str]] = {
        "train": "coco_train_localized_narratives",
        "val": "coco_val_localized_narratives",
    }
    folders: ClassVar[Mapping[str, str]] = {"train": "train2017", "val": "val2017"}
    expected_layout = (
        "train2017/<image id:012d>.jpg and val2017/...             (the images of COCO 2017)\n"
        "coco_train_localized_narratives-0000<n>-of-00004.jsonl    (or in annotations/ or localized_narratives/)\n"
        "coco_val_localized_narratives.jsonl"
    )
    size = "20 GB of images and 3 GB of narratives"
    id_digits = 12


class LocalizedNarrativesOpenImages(LocalizedNarratives):
    """LN-OpenImages: one narrative for most images of Open Images. Source: docs/papers/xmc_gan.md [7]."""

    name = "ln_open_images"
    title = "Localized Narratives, Open Images V6"
    splits = ("train", "validation", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"val": "validation"}
    optional_splits = frozenset({"test"})
    files: ClassVar[Mapping[str, str]] = {
        "train": "open_images_train_v6_localized_narratives",
        "validation": "open_images_validation_localized_narratives",
        "test": "open_images_test_localized_narratives",
    }
    folders: ClassVar[Mapping[str, str]] = {split: split for split in splits}
    expected_layout = (
        "train/<image id>.jpg, validation/... and test/...                   (of Open Images V6)\n"
        "open_images_train_v6_localized_narratives-0000<n>-of-00010.jsonl    (or in annotations/ or\n"
        "                                                                    localized_narratives/)\n"
        "open_images_validation_localized_narratives.jsonl\n"
        "open_images_test_localized_narratives.jsonl                         (optional)"
    )
    size = "several hundred GB"


@read_once()
def read_narratives(paths: tuple[Path, ...], digits: int) -> CaptionedImages:
    """Read files of narratives once per process. The contents of large files are also cached on disk.

    Images are ordered by their first narrative. Images and narratives are numbered consecutively.
    """
    numbers: dict[str, int] = {}
    captions: list[tuple[str, int, int]] = []
    for path in paths:
        columns = kept_columns(path, _narrative_columns)
        buffer, ends = columns["captions"].tobytes(), columns["ends"].tolist()
        for image_id, start, end in zip(columns["image_ids"].tolist(), ends, ends[1:]):
            number = numbers.setdefault(image_id, len(numbers))
            captions.append((buffer[start:end].decode("utf-8", "surrogatepass"), len(captions), number))
    images = ((f"{image_id.zfill(digits)}.jpg", number, number) for image_id, number in numbers.items())
    with parsing(paths[0], DatasetError):
        return captioned_images(paths[0], images, captions)


def _narrative_columns(path: Path) -> dict[str, npt.NDArray[Any]]:
    narratives = list(read_json_lines(path, lambda record: (str(record["image_id"]), str(record["caption"]))))
    captions = Texts(caption for _, caption in narratives)
    return {
        "image_ids": np.array([image_id for image_id, _ in narratives], dtype=np.str_),
        "captions": np.frombuffer(captions.buffer, dtype=np.uint8),
        "ends": captions.ends,
    }


def write_narratives(path: Path, narratives: Sequence[tuple[str, str]], parts: int | None = None) -> None:
    """Write narratives (image id, text) to `<path>.jsonl`, or to `parts` numbered files as in the larger splits."""
    lines = [
        json.dumps(
            {
                "dataset_id": path.name,
                "image_id": image_id,
                "annotator_id": number,
                "caption": caption,
                "timed_caption": [{"utterance": "a", "start_time": 0.0, "end_time": 0.4}],
                "traces": [[{"x": 0.2, "y": 0.7, "t": 0.02}]],
                "voice_recording": f"{image_id}_{number}.ogg",
            },
            ensure_ascii=False,
        )
        for number, (image_id, caption) in enumerate(narratives)
    ]
    for part in range(parts or 1):
        ending = "" if parts is None else f"-{part:05d}-of-{parts:05d}"
        write_lines(path.with_name(f"{path.name}{ending}.jsonl"), lines[part :: parts or 1])
