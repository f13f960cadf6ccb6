"""TVC: descriptions of moments of TVQA's clips."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.data.annotations import read_json_lines, single_spaced
from common.data.datasets.base import MediaDataset, Scan, in_order
from common.data.datasets.tvqa import (
    TVQA,
    Subtitles,
    folder_of,
    frame_folders,
    read_words,
    subtitle_notes,
)
from common.data.media import Limits

_FILES = {
    "train": "tvc_train_release.jsonl",
    "val": "tvc_val_release.jsonl",
    "test": "tvc_test_public_release.jsonl",
}
_FOLDERS = ("", "data/")


@dataclass(frozen=True, slots=True)
class Description:
    """A sentence about a moment. `kind` is "v" (about the video), "t" (the subtitles), "vt" (both) or "" (unknown)."""

    number: int
    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class Moment:
    """A part of a clip. `span` is the first and last second; `descriptions` is empty if they are not public."""

    number: int
    clip: str
    span: Limits
    descriptions: tuple[Description, ...]


class TVC(MediaDataset):
    """TVC: moments of the clips of TVQA, each with two descriptions for training or four references.

    A listing has a row per moment whose clip exists; the row covers only the span. The test split has no descriptions.

    Args:
        clips: folder with frames and subtitles as in :class:`TVQA`; None = the sibling folder `tvqa`.

    Source: docs/papers/vx2text.md [10].
    """

    name = "tvc"
    title = "TVC"
    splits = ("train", "val", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val", "test_public": "test"}
    optional_splits = frozenset({"test"})
    published_counts: ClassVar[Mapping[str, int]] = {"train": 86_603, "val": 10_841, "test": 5_420}
    streams = ("video",)
    expected_layout = (
        "tvc_train_release.jsonl, tvc_val_release.jsonl, tvc_test_public_release.jsonl   (here or in data/)\n"
        "../tvqa/ with frames_hq/<show>_frames/<clip>/00001.jpg ... and tvqa_preprocessed_subtitles.jsonl   (see TVQA)"
    )
    size = "30 MB of text; the frames are those of TVQA, 43 GB"
    license = "CC BY-NC-SA 4.0; frames by signed agreement"
    source = "https://github.com/jayleicn/TVCaption; frames from http://tvqa.cs.unc.edu/download_tvqa.html"

    def __init__(self, root: str | os.PathLike[str], clips: str | os.PathLike[str] | None = None) -> None:
        super().__init__(root)
        self.clips = None if clips is None else Path(clips).expanduser()

    def moments(self, split: str) -> list[Moment]:
        """Return the moments of a split, in the order of the listing."""
        split, _ = self._checked(split, None)
        return in_order(self._found(split, []))

    def subtitles(self) -> Subtitles:
        return TVQA(self._home).subtitles()

    def words(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        return read_words(self._home)

    @property
    def _home(self) -> Path:
        return self.clips or self.root.parent / TVQA.name

    def _options(self) -> dict[str, object]:
        return {"clips": str(self.clips)}

    def _scan(self, split: str, fold: int | None) -> Scan:
        scan = Scan((), "moments in JSON lines, frames in folders")
        moments = self._found(split, scan.watched)
        for name, moment in moments:
            scan.add(name, f"{moment.clip} (moment {moment.number})", start=moment.span[0], end=moment.span[1])
        subtitle_notes(scan, self, {moment.clip for name, moment in moments if name is not None})
        return scan

    def _found(self, split: str, watched: list[Path]) -> list[tuple[str | None, Moment]]:
        """Return the frame folder and the content of each moment. The folder is None if it does not exist."""
        path = self._one_of(*(folder + _FILES[split] for folder in _FOLDERS), reason="the moments are missing")
        folders = frame_folders(self, self._home, watched)
        watched += [path.parent, path]
        # Use relative names even for a sibling folder, because they are the same on every machine.
        prefix = Path(os.path.relpath(self._home, self.root)).as_posix()
        names = {name: os.path.normpath(f"{prefix}/{folder}") for name, folder in folders.items()}
        moments = read_json_lines(path, functools.partial(_moment, withheld=split == "test"))
        return [(folder_of(moment.clip, names), moment) for moment in moments]


def _moment(record: dict[str, Any], withheld: bool) -> Moment:
    start, end = map(float, record["ts"])
    if not 0 <= start < end:
        raise ValueError(f'"ts" must be [start, end] in seconds with start before end, not {record["ts"]}')
    descriptions = tuple(
        Description(int(entry["desc_id"]), single_spaced(entry["desc"]), str(entry.get("type", "")))
        for entry in record.get("descs") or ()
    )
    if not (descriptions or withheld):
        raise ValueError('"descs" is empty; a moment of this split must have a description')
    return Moment(int(record["clip_id"]), str(record["vid_name"]), (start, end), descriptions)
