"""Kinetics-400."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common.data.annotations import read_csv
from common.data.datasets.base import (
    VIDEO_SUFFIXES,
    MediaDataset,
    Scan,
    WriteMedia,
    entries,
    first_of,
    placeholder,
    prefix_of,
    put,
    video_id,
    walk,
    write_lines,
)
from common.types import NonNegativeFloat

# Usual folder names of each split.
_FOLDERS = {
    "train": ("train", "train_256", "videos_train", "videos/train"),
    "validation": ("val", "validation", "val_256", "videos_val", "videos/val"),
    "test": ("test", "test_256", "videos_test", "videos/test"),
}
_LISTS = {
    "train": ("annotations/train.csv", "train.csv"),
    "validation": ("annotations/val.csv", "annotations/validate.csv", "val.csv", "validate.csv"),
    "test": ("annotations/test.csv", "test.csv"),
}
_REPLACEMENTS = ("replacement", "replacement_for_corrupted_k400", "train/replacement_for_corrupted_k400")


class Kinetics400(MediaDataset):
    """Kinetics-400: ten-second clips of 400 human actions.

    A split folder has a folder per class, or all clips and a list of classes, as in the CVDF archives. A file in
    `replacement/` replaces a corrupted file of the same name. Classes are in alphabetical order.

    Args:
        common_seconds: keep only clips whose picture and sound overlap for more than this many seconds. None keeps all.
    """

    name = "kinetics400"
    title = "Kinetics-400"
    splits = ("train", "validation", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"val": "validation"}
    optional_splits = frozenset({"test"})
    num_classes = 400
    # Copies differ because videos disappear from YouTube: AVID trained on 232,067 clips.
    published_counts: ClassVar[Mapping[str, int]] = {"train": 240_000, "validation": 19_900}
    count_tolerance = 0.05
    streams = ("video", "audio")
    expected_layout = (
        "train/<class>/<youtube id>_<start:06d>_<end:06d>.mp4 and val/<class>/...   (class folders)\n"
        "or\n"
        "train/<youtube id>_<start:06d>_<end:06d>.mp4 and val/...                   (flat, CVDF copy)\n"
        "annotations/train.csv and annotations/val.csv: label,youtube_id,time_start,time_end,split\n"
        "replacement/**/*.mp4                                                       (optional)"
    )
    size = "135 to 450 GB, depending on the resolution of the copy"
    license = "annotations CC BY 4.0; the videos belong to their uploaders"
    source = "the CVDF copy, https://github.com/cvdfoundation/kinetics-dataset"

    def __init__(self, root: str | os.PathLike[str], common_seconds: NonNegativeFloat | None = None) -> None:
        super().__init__(root)
        self.common_seconds = common_seconds

    def _scan(self, split: str, fold: int | None) -> Scan:
        folder = self._one_of(*_FOLDERS[split])
        watched: list[Path] = [folder]
        replacements = self._replacements(watched)
        if any(Path(name).suffix.lower() in VIDEO_SUFFIXES for name in entries(folder)[1]):
            return self._flat(split, folder, replacements, watched)
        return self._class_folders(folder, replacements, watched)

    def _class_folders(self, folder: Path, replacements: dict[str, str], watched: list[Path]) -> Scan:
        own_classes = _class_names(folder)
        # Read both splits, so that they have the same labels even if one lacks a class.
        beside = [other for split in ("train", "validation") if (other := first_of(self.root, _FOLDERS[split]))]
        watched += beside
        classes = tuple(sorted({*own_classes, *(name for other in beside for name in _class_names(other))}))
        scan = Scan(classes, f"class folders in {folder.name}/", watched)
        prefix = prefix_of(folder, self.root)
        for class_name in own_classes:
            label = classes.index(class_name)
            for name, stem in walk(folder / class_name, VIDEO_SUFFIXES, watched):
                scan.add(replacements.get(stem, f"{prefix}{class_name}/{name}"), label=label)
        return scan

    def _flat(self, split: str, folder: Path, replacements: dict[str, str], watched: list[Path]) -> Scan:
        own_list = self._one_of(
            *_LISTS[split],
            reason=f"{folder.name}/ holds videos without class folders, and the list with their classes is missing",
        )
        # Take classes from train and val together, so that all splits have the same labels.
        lists = {own_list, *(path for part in ("train", "validation") if (path := first_of(self.root, _LISTS[part])))}
        watched += [place for path in lists for place in (path.parent, path)]
        rows = {path: list(_rows(path)) for path in lists}
        classes = tuple(sorted({label for listed in rows.values() for label, _ in listed if label}))
        label_of = {name: label for label, name in enumerate(classes)}
        prefix = prefix_of(folder, self.root)
        files = {stem: prefix + name for name, stem in walk(folder, VIDEO_SUFFIXES, watched)} | replacements
        scan = Scan(classes, f"flat {folder.name}/ with {own_list.relative_to(self.root)}", watched)
        for label, stem in dict.fromkeys(rows[own_list]):
            scan.add(files.get(stem), stem, label=label_of.get(label, -1))
        return scan

    def _replacements(self, watched: list[Path]) -> dict[str, str]:
        """Map file stems to replacement files, relative to the root."""
        files: dict[str, str] = {}
        for folder in (self.root / name for name in _REPLACEMENTS):
            if folder.is_dir():
                for name, stem in walk(folder, VIDEO_SUFFIXES, watched):
                    files.setdefault(stem, prefix_of(folder, self.root) + name)
        return files


def _class_names(folder: Path) -> list[str]:
    return [name for name in entries(folder)[0] if not name.startswith("replacement")]


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the label and file stem of each row. Lists of test clips may lack the label."""

    def parse(row: dict[str, str]) -> tuple[str, str]:
        video = row["youtube_id"].strip()
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
        return (row.get("label") or "").strip(), f"{video}_{start:06d}_{end:06d}"

    return read_csv(path, parse)


def write_kinetics(
    root: Path,
    classes: Sequence[str] = ("abseiling", "tai chi"),
    clips_per_class: int = 2,
    flat: bool = False,
    folders: Sequence[str] = ("train", "val"),
    write: WriteMedia = placeholder,
) -> Path:
    """Write class folders, or flat folders with `annotations/*.csv` as in the CVDF copy."""
    for folder in folders:
        rows = []
        for class_number, class_name in enumerate(classes):
            for clip in range(clips_per_class):
                video = video_id(class_number * 100 + clip, prefix=f"{folder[0]}-")
                name = f"{video}_{clip * 10:06d}_{clip * 10 + 10:06d}.mp4"
                rows.append(f"{class_name},{video},{clip * 10},{clip * 10 + 10},{folder}")
                put(root / folder / name if flat else root / folder / class_name / name, write)
        if flat:
            heading = "label,youtube_id,time_start,time_end,split"
            write_lines(root / "annotations" / f"{folder}.csv", [heading, *rows], "\r\n")
    return root
