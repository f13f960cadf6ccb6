"""Kinetics-400."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from common.data.datasets.base import (
    VIDEO_SUFFIXES,
    MediaDataset,
    Scan,
    csv_rows,
    entries,
    first_file,
    first_folder,
    prefix_of,
    walk,
)
from common.types import NonNegativeFloat

# Usual folder names of each split.
_FOLDERS = {
    "train": ("train", "train_256", "videos_train", "videos/train"),
    "validation": ("val", "validation", "val_256", "videos_val", "videos/val"),
    "test": ("test", "test_256", "videos_test", "videos/test"),
}
_LISTS = {
    "train": ("annotations/train.csv", "train.csv", "annotations/kinetics_train.csv", "kinetics400/train.csv"),
    "validation": (
        "annotations/val.csv",
        "annotations/validate.csv",
        "val.csv",
        "validate.csv",
        "annotations/kinetics_val.csv",
        "kinetics400/validate.csv",
    ),
    "test": ("annotations/test.csv", "test.csv", "annotations/kinetics_test.csv", "kinetics400/test.csv"),
}
_REPLACEMENTS = ("replacement", "replacement_for_corrupted_k400", "train/replacement_for_corrupted_k400")
_ID_LENGTH = 11


class Kinetics400(MediaDataset):
    """Kinetics-400: ten-second clips of 400 human actions.

    Two layouts are read, depending on the contents of the split's folder:

    - *class folders*: ``train/<class>/<youtube id>_<start>_<end>.mp4``.
    - *flat with lists*: ``train/<youtube id>_<start>_<end>.mp4``, as in the CVDF archives, with
      ``annotations/train.csv`` (columns label, youtube_id, time_start, time_end, split) for the classes.

    A file under ``replacement/`` replaces a corrupted one of the same name. Classes are in alphabetical order. The
    clips are already cut, so ``start`` and ``end`` of a :class:`Clip` are None.

    Args:
        common_seconds: leave out clips with at most this much of picture and sound together; None = keep all.
    """

    name = "kinetics400"
    title = "Kinetics-400"
    splits = ("train", "validation", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"val": "validation"}
    optional_splits = frozenset({"test"})
    num_classes = 400
    # Copies differ, because videos disappear: AVID trained on 232,067 clips.
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
        folder = first_folder(self.root, _FOLDERS[split])
        if folder is None:
            raise self._lacks(self.root / _FOLDERS[split][0])
        watched: list[Path] = [folder]
        replacements = self._replacements(watched)
        folders, files = entries(folder)
        if any(Path(name).suffix.lower() in VIDEO_SUFFIXES for name in files):
            return self._flat(split, folder, replacements, watched)
        return self._class_folders(folder, _class_names(folders), replacements, watched)

    def _class_folders(
        self, folder: Path, own_classes: list[str], replacements: dict[str, str], watched: list[Path]
    ) -> Scan:
        # Both splits must have the same labels, even if one lacks a class.
        known = set(own_classes)
        for other in ("train", "validation"):
            beside = first_folder(self.root, _FOLDERS[other])
            if beside is not None and beside != folder:
                watched.append(beside)
                known.update(_class_names(entries(beside)[0]))
        classes = tuple(sorted(known))
        label_of = {name: label for label, name in enumerate(classes)}
        scan = Scan(classes, f"class folders in {folder.name}/", watched=watched)
        prefix = prefix_of(folder, self.root)
        for class_name in own_classes:
            for name, stem in walk(folder / class_name, VIDEO_SUFFIXES, watched):
                scan.names.append(replacements.get(stem, f"{prefix}{class_name}/{name}"))
                scan.labels.append(label_of[class_name])
        return scan

    def _flat(self, split: str, folder: Path, replacements: dict[str, str], watched: list[Path]) -> Scan:
        lists = {part: first_file(self.root, names) for part, names in _LISTS.items()}
        own_list = lists[split]
        if own_list is None:
            raise self._lacks(
                self.root / _LISTS[split][0],
                f"{folder.name}/ holds videos without class folders, and the list with their classes is missing",
            )
        known: set[str] = set()
        rows: list[tuple[str, str, str]] = []
        for part, path in lists.items():
            # Classes come from train and val together, so that all splits have the same labels.
            if path is None or (part == "test" and split != "test"):
                continue
            watched += [path.parent, path]
            found = list(_rows(path))
            known.update(label for label, _, _ in found if label)
            if part == split:
                rows = found
        files: dict[str, str] = {}
        by_video: dict[str, str] = {}
        prefix = prefix_of(folder, self.root)
        for name, stem in walk(folder, VIDEO_SUFFIXES, watched):
            files[stem] = replacements.get(stem, prefix + name)
            by_video[stem[:_ID_LENGTH]] = files[stem]
        listed_videos: dict[str, int] = {}
        for _, video, _ in rows:
            listed_videos[video] = listed_videos.get(video, 0) + 1
        classes = tuple(sorted(known))
        label_of = {name: label for label, name in enumerate(classes)}
        scan = Scan(classes, f"flat {folder.name}/ with {own_list.relative_to(self.root)}", watched=watched)
        taken: set[str] = set()
        for label, video, stem in rows:
            path_name = files.get(stem) or replacements.get(stem)
            if path_name is None and listed_videos[video] == 1:
                # Some copies omit or change the time stamps; with one clip per video the name is still unique.
                path_name = by_video.get(video)
            if path_name is None:
                scan.missing_names.append(stem)
            elif path_name not in taken:
                taken.add(path_name)
                scan.names.append(path_name)
                scan.labels.append(label_of[label] if label else -1)
        return scan

    def _replacements(self, watched: list[Path]) -> dict[str, str]:
        """File stem -> replacement, relative to the root."""
        found: dict[str, str] = {}
        for candidate in _REPLACEMENTS:
            folder = self.root / candidate
            if folder.is_dir():
                prefix = prefix_of(folder, self.root)
                for name, stem in walk(folder, VIDEO_SUFFIXES, watched):
                    found.setdefault(stem, prefix + name)
        return found


def _class_names(folders: list[str]) -> list[str]:
    return [name for name in folders if not name.startswith("replacement")]


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (label, video, file stem); lists of test clips may lack the label."""
    with csv_rows(path) as reader:
        columns = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
        needed = [name for name in ("youtube_id", "time_start", "time_end") if name not in columns]
        if needed:
            raise ValueError(
                f"{path} lacks the columns {', '.join(needed)}; its first line must be "
                "label,youtube_id,time_start,time_end,split"
            )
        for line, row in enumerate(reader, start=2):
            try:
                start, end = (int(float(row[columns[name]])) for name in ("time_start", "time_end"))
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {line}: time_start and time_end must be numbers") from None
            video = row[columns["youtube_id"]].strip()
            label = (row.get(columns.get("label", "label")) or "").strip()
            yield label, video, f"{video}_{start:06d}_{end:06d}"
