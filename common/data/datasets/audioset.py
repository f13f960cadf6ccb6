"""AudioSet."""

from __future__ import annotations

import csv
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from common.data.annotations import read_csv, read_rows
from common.data.datasets.base import (
    AUDIO_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaDataset,
    Scan,
    WriteMedia,
    first_of,
    placeholder,
    prefix_of,
    put,
    read_lines,
    video_id,
    walk,
    write_lines,
)
from common.data.listing import DatasetError, DatasetMissing
from common.types import NonNegativeFloat

_LIST_FOLDERS = ("", "metadata/", "csv/")
_LIST_OF = {
    "unbalanced_train": "unbalanced_train_segments.csv",
    "balanced_train": "balanced_train_segments.csv",
    "evaluation": "eval_segments.csv",
}
# Folders of a split. If there are none, `videos` or the root holds the clips of all splits.
_FOLDERS_OF = {
    "unbalanced_train": ("unbalanced_train_segments", "unbalanced_train"),
    "balanced_train": ("balanced_train_segments", "balanced_train"),
    "evaluation": ("eval_segments", "evaluation", "eval"),
}
_CLASS_LIST = "class_labels_indices.csv"
_PUBLISHED_LISTS = {"unbalanced_train-100k.txt": 100_000}
_ID_LENGTH = 11
_TIMES = re.compile(r"(?:_\d+(?:\.\d+)?){0,2}")


class AudioSet(MediaDataset):
    """AudioSet: ten-second clips of YouTube videos with 527 sound classes. Only the first label of a clip is used.

    Clips may be in subfolders. Their names are `<YTID>`, `<YTID>_<start>` or `<YTID>_<start>_<end>` (seconds or
    milliseconds), optionally with a leading `Y`. If a clip has a video and a sound file, the video is used. Without
    `class_labels_indices.csv`, the sorted identifiers in the lists are the classes.

    Args:
        clip_list: restrict training to the clips in this text file, one YTID or ``<YTID>_<start>_<end>.mp4`` per line,
            as in the 100,000-clip ablations. None = all.
        in_list_order: keep the order of `clip_list` instead of sorting by name, so that clips match the rows of
            released memory banks. All clips must exist.
        trimmed: False if files are whole videos; ``start`` and ``end`` of a clip then select a part.
        common_seconds: keep only clips whose picture and sound overlap for more than this many seconds. None keeps all.
    """

    name = "audioset"
    title = "AudioSet"
    splits = ("unbalanced_train", "balanced_train", "evaluation")
    split_aliases: ClassVar[Mapping[str, str]] = {
        "train": "unbalanced_train",
        "validation": "evaluation",
        "eval": "evaluation",
        "test": "evaluation",
    }
    optional_splits = frozenset({"balanced_train", "evaluation"})
    num_classes = 527
    # The lists name 2,041,789, 22,160 and 20,371 clips, but not all are still available.
    published_counts: ClassVar[Mapping[str, int]] = {
        "unbalanced_train": 1_784_108,
        "balanced_train": 22_160,
        "evaluation": 20_371,
    }
    count_tolerance = 0.2
    streams = ("video", "audio")
    expected_layout = (
        "unbalanced_train_segments.csv, balanced_train_segments.csv, eval_segments.csv   (here or in metadata/)\n"
        "class_labels_indices.csv                                                        (optional: class names)\n"
        "unbalanced_train_segments/**/<YTID>_<start>_<end>.mp4                           (also [Y]<YTID>.mp4)\n"
        "balanced_train_segments/**/...  eval_segments/**/...                            (or all clips in videos/)"
    )
    size = "about 2.4 TB as 10 s video clips, depending on the resolution fetched"
    license = "lists CC BY 4.0; the videos belong to their uploaders"
    source = "lists from https://research.google.com/audioset/download.html; clips have to be fetched from YouTube"

    def __init__(
        self,
        root: str | os.PathLike[str],
        clip_list: str | os.PathLike[str] | None = None,
        trimmed: bool = True,
        common_seconds: NonNegativeFloat | None = None,
        in_list_order: bool = False,
    ) -> None:
        super().__init__(root)
        self.common_seconds = common_seconds
        self.clip_list = None if clip_list is None else Path(clip_list).expanduser()
        self.trimmed = trimmed
        self.in_list_order = in_list_order
        if in_list_order and clip_list is None:
            raise ValueError("data.dataset.in_list_order needs data.dataset.clip_list: set both or neither")

    def published_count(self, split: str, fold: int | None = None) -> int | None:
        """Return the published number of clips. None for the clips of a `clip_list`, except the 100,000-clip list."""
        if self.clip_list is None or split == "evaluation":
            return super().published_count(split, fold)
        return _PUBLISHED_LISTS.get(self.clip_list.name)

    def _options(self) -> dict[str, object]:
        options: dict[str, object] = {"clip_list": str(self.clip_list), "trimmed": self.trimmed}
        return {**options, "in_list_order": True} if self.in_list_order else options

    def _scan(self, split: str, fold: int | None) -> Scan:
        own_list = self._one_of(*self._list_names(_LIST_OF[split]), reason="the list of segments is missing")
        watched: list[Path] = [own_list.parent, own_list]
        segments = list(_segments(own_list))
        class_list = first_of(self.root, self._list_names(_CLASS_LIST))
        if class_list is not None:
            watched += [class_list.parent, class_list]
            identifiers, classes = _class_names(class_list)
        else:
            # Read all lists, so that every split has the same labels.
            paths = (first_of(self.root, self._list_names(name)) for part, name in _LIST_OF.items() if part != split)
            others = [path for path in paths if path is not None]
            watched += others
            rows = itertools.chain(segments, *map(_segments, others))
            identifiers = classes = tuple(sorted({label for *_, labels in rows for label in labels}))
        label_of = {identifier: label for label, identifier in enumerate(identifiers)}

        folder = first_of(self.root, (*_FOLDERS_OF[split], "videos")) or self.root
        listed = {video for video, *_ in segments}
        files: dict[str, str] = {}
        prefix = prefix_of(folder, self.root)
        for suffixes in (VIDEO_SUFFIXES, AUDIO_SUFFIXES):
            for name, stem in walk(folder, suffixes, watched):
                video = _video_of(stem, listed)
                if video is not None:
                    files.setdefault(video, prefix + name)

        scan = Scan(classes, f"{own_list.relative_to(self.root)} with clips in {prefix or 'the root'}", watched)
        wanted = self._wanted(watched)
        if wanted is not None and split != "evaluation":
            segments = [segment for segment in segments if segment[0] in wanted]
            if self.in_list_order:
                scan.in_order = True
                segments.sort(key=lambda segment: wanted[segment[0]])
        for video, start, end, labels in segments:
            label = label_of.get(labels[0], -1) if labels else -1
            start, end = (math.nan, math.nan) if self.trimmed else (start, end)
            scan.add(files.get(video), video, label=label, sound_label=label, start=start, end=end)
        return scan

    @staticmethod
    def _list_names(name: str) -> list[str]:
        return [folder + name for folder in _LIST_FOLDERS]

    def _wanted(self, watched: list[Path]) -> dict[str, int] | None:
        """Return the clips of `clip_list` and their positions."""
        if self.clip_list is None:
            return None
        if not self.clip_list.is_file():
            raise DatasetMissing(
                f"AudioSet: clip_list names {self.clip_list}, which does not exist; "
                "give a text file with one YTID per line"
            )
        watched.append(self.clip_list)
        names = (os.path.basename(line.split(",")[0].strip()) for line in read_lines(self.clip_list))
        identifiers = (name[:_ID_LENGTH] for name in names if not name.startswith("#"))
        return {video: place for place, video in enumerate(dict.fromkeys(identifiers))}


def _segments(path: Path) -> Iterator[tuple[str, float, float, tuple[str, ...]]]:
    """Yield the rows of a list of segments: YTID, start and end in seconds, label identifiers."""

    def parse(row: list[str]) -> tuple[str, float, float, tuple[str, ...]]:
        # A list without quotes has its labels in several columns.
        labels = ",".join(row[3:]).split(",")
        return row[0].strip(), float(row[1]), float(row[2]), tuple(filter(None, map(str.strip, labels)))

    def reader(lines: Iterator[str]) -> Iterator[list[str]]:
        rows = csv.reader(lines, skipinitialspace=True)
        return (row for row in rows if row and not row[0].startswith("#") and row[0].strip().lower() != "ytid")

    return read_rows(path, reader, parse)


def _class_names(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return identifiers and display names of the classes, in the order of their official index."""
    rows = read_csv(path, lambda row: (int(row["index"]), row["mid"], row["display_name"]), skipinitialspace=True)
    if not (ordered := sorted(rows)):
        raise DatasetError(f"{path}: lists no classes; download it again")
    _, identifiers, names = zip(*ordered)
    return identifiers, names


def _video_of(stem: str, listed: set[str]) -> str | None:
    """Find the listed video that a file belongs to. An identifier may contain underscores and start with Y."""
    for begin in (0, 1) if stem.startswith("Y") else (0,):
        video = stem[begin : begin + _ID_LENGTH]
        if video in listed and _TIMES.fullmatch(stem, begin + _ID_LENGTH):
            return video
    return None


def write_audioset(
    root: Path,
    clips: int = 3,
    listed: int | None = None,
    naming: str = "{video}_{start}_{end}.mp4",
    folder: str = "unbalanced_train_segments",
    list_name: str = "unbalanced_train_segments.csv",
    prefix: str = "u",
    write: WriteMedia = placeholder,
) -> Path:
    """Write a list of `listed` segments, and the first `clips` of their clips. The other clips are missing."""
    lines = ["# YTID, start_seconds, end_seconds, positive_labels"]
    for number in range(clips if listed is None else listed):
        video, start = video_id(number, prefix), number * 10
        labels = "/m/09x0r,/t/dd00088" if number % 2 == 0 else "/m/03k3r"
        lines.append(f'{video}, {start}.000, {start + 10}.000, "{labels}"')
        if number < clips:
            put(root / folder / naming.format(video=video, start=start, end=start + 10), write)
    write_lines(root / list_name, lines)
    return root
