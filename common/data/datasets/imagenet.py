"""ImageNet (ILSVRC 2012)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common.data.datasets.base import (
    IMAGE_SUFFIXES,
    MediaDataset,
    Scan,
    entries,
    first_of,
    prefix_of,
    read_lines,
    walk,
    write_lines,
)
from common.data.listing import DatasetError

_FOLDERS = {
    "train": ("train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train"),
    "validation": ("val", "validation", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val"),
}


class ImageNet(MediaDataset):
    """ImageNet of the 2012 challenge: photographs of 1,000 classes. Each split has a folder (WordNet id) per class.

    Args:
        class_list: file with a class at the start of each line, such as ImageNet-100. Only these classes are used. They
            are sorted by name.

    Source: docs/papers/mct.md [9], "ImageNet linear".
    """

    name = "imagenet"
    title = "ImageNet (ILSVRC 2012)"
    splits = ("train", "validation")
    split_aliases: ClassVar[Mapping[str, str]] = {"val": "validation"}
    num_classes = 1000
    published_counts: ClassVar[Mapping[str, int]] = {"train": 1_281_167, "validation": 50_000}
    streams = ("image",)
    expected_layout = (
        "train/<WordNet id>/<WordNet id>_<number>.JPEG\n"
        "val/<WordNet id>/ILSVRC2012_val_<number:08d>.JPEG   (the archive is flat: sort it into class folders)"
    )
    size = "145 GB"
    license = "non-commercial research, by the terms of image-net.org"
    source = "https://image-net.org/challenges/LSVRC/2012 (registration)"

    def __init__(self, root: str | Path, class_list: str | Path | None = None) -> None:
        super().__init__(root)
        self.class_list = None if class_list is None else Path(class_list).expanduser()

    @property
    def full_title(self) -> str:
        return self.title if self.class_list is None else f"{self.title}, classes of {self.class_list.name}"

    def published_count(self, split: str, fold: int | None = None) -> int | None:
        return self.published_counts[split] if self.class_list is None else None

    def published_classes(self) -> int | None:
        return self.num_classes if self.class_list is None else len(self._listed())

    def _options(self) -> dict[str, object]:
        if self.class_list is None:
            return {}
        return {"classes": hashlib.sha256("\n".join(self._listed()).encode("utf-8", "surrogateescape")).hexdigest()}

    def _scan(self, split: str, fold: int | None) -> Scan:
        folder = self._one_of(*_FOLDERS[split])
        folders, files = entries(folder)
        if not folders and any(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in files):
            raise self._lacks(
                folder,
                "expected one folder per class, but all images are in one; move each validation image into the "
                "folder of its class, for example with the script valprep.sh",
            )
        # Read both splits, so that they have the same labels even if one lacks a class.
        watched = [path for names in _FOLDERS.values() if (path := first_of(self.root, names)) is not None]
        class_names = {name for path in watched for name in entries(path)[0]}
        if self.class_list is not None:
            strangers = sorted({*self._listed()} - class_names)
            if strangers:
                raise DatasetError(
                    f"class_list: {self.class_list} names {len(strangers)} classes without a folder in {folder}, "
                    f"such as {strangers[0]}"
                )
            class_names = {*self._listed()}
        classes = tuple(sorted(class_names))
        prefix = prefix_of(folder, self.root)
        scan = Scan(classes, f"class folders in {prefix}", watched)
        for label, name in enumerate(classes):
            if name in folders:
                for image, _ in walk(folder / name, IMAGE_SUFFIXES, watched):
                    scan.add(f"{prefix}{name}/{image}", label=label)
        empty = len(classes) - len({numbers[0] for _, numbers, _ in scan.rows})
        if empty and scan.rows:
            scan.notes.append(f"{empty} of {len(classes)} classes have no images")
        return scan

    def _listed(self) -> list[str]:
        assert self.class_list is not None
        if not self.class_list.is_file():
            raise self._lacks(self.class_list, "no class_list (one class folder per line) was found")
        names = sorted({line.split()[0] for line in read_lines(self.class_list)})
        if not names:
            raise DatasetError(f"class_list: {self.class_list} is empty; it should hold one class folder per line")
        return names


# ---------------------------------------------------------------------------------------------------- writing
def imagenet_class(number: int) -> str:
    """Return a made-up WordNet ID for a class folder, above the range of real IDs."""
    return f"n9{number:07d}"


def imagenet_path(root: Path, split: str, label: int, number: int) -> Path:
    """Return the path of picture `number` (from 1) in `train` or `val`."""
    folder = imagenet_class(label)
    stem = f"{folder}_{number}" if split == "train" else f"ILSVRC2012_val_{number:08d}"
    return root / split / folder / f"{stem}.JPEG"


def write_class_names(root: Path, names: Sequence[str]) -> None:
    """Write ``LOC_synset_mapping.txt``, which names the class folders."""
    lines = (f"{imagenet_class(number)} {name}" for number, name in enumerate(names))
    write_lines(root / "LOC_synset_mapping.txt", lines)
