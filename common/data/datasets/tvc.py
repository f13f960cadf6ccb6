"""TVC: descriptions of moments of TVQA's clips."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.data.annotations import entry_of, objects, read_json_lines
from common.data.datasets.base import MediaDataset, Scan, first_file
from common.data.datasets.tvqa import (
    TVQA,
    Subtitles,
    folder_of,
    frame_folders,
    read_words,
    subtitle_notes,
)
from common.data.listing import DatasetMissing
from common.data.media import Limits

_FILES = {
    "train": "tvc_train_release.jsonl",
    "val": "tvc_val_release.jsonl",
    "test": "tvc_test_public_release.jsonl",
}
_FOLDERS = ("", "data/")


@dataclass(frozen=True, slots=True)
class Description:
    """A sentence about a moment; `kind` is its source: `v`ideo, `t`ext (subtitles), `vt`, or "" if unknown."""

    number: int
    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class Moment:
    """A part of a clip; `span` is its first and last second, `descriptions` is empty if withheld."""

    number: int
    clip: str
    span: Limits
    descriptions: tuple[Description, ...]


class TVC(MediaDataset):
    """TVC: moments of the clips of TVQA, each with two descriptions for training or four references.

    A listing has one row per moment whose clip exists, with the moment as limits. The test split has no descriptions.

    Args:
        clips: folder with frames and subtitles as in :class:`TVQA`; None = the root, else the sibling folder `tvqa`.

    Source: docs/papers/vx2text.md [10].
    """

    name = "tvc"
    title = "TVC"
    splits = ("train", "val", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val", "test_public": "test"}
    optional_splits = frozenset({"test"})
    num_classes = 0
    published_counts: ClassVar[Mapping[str, int]] = {"train": 86_603, "val": 10_841, "test": 5_420}
    streams = ("video",)
    expected_layout = (
        "tvc_train_release.jsonl, tvc_val_release.jsonl, tvc_test_public_release.jsonl   (here or in data/)\n"
        "frames_hq/<show>_frames/<clip>/00001.jpg ... and tvqa_preprocessed_subtitles.jsonl\n"
        "                                       (here or in the folder tvqa beside this one; see TVQA)"
    )
    size = "30 MB of text; the frames are those of TVQA, 43 GB"
    license = "CC BY-NC-SA 4.0; frames by signed agreement"
    source = "https://github.com/jayleicn/TVCaption; frames from http://tvqa.cs.unc.edu/download_tvqa.html"

    def __init__(self, root: str | os.PathLike[str], clips: str | os.PathLike[str] | None = None) -> None:
        super().__init__(root)
        self.clips = None if clips is None else Path(clips).expanduser()

    def moments(self, split: str) -> list[Moment]:
        """The moments of a split, in the order of its listing."""
        split, _ = self._checked(split, None)
        found, _ = self._found(split, [])
        return [moment for _, moment in sorted(found, key=lambda row: row[0])]

    def subtitles(self) -> Subtitles:
        missing: DatasetMissing | None = None
        for home in self._homes():
            try:
                return TVQA(home).subtitles()
            except DatasetMissing as error:
                missing = missing or error
        assert missing is not None
        raise missing

    def words(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """True categories of picture and sound of every clip; only miniatures have them."""
        return next((found for home in self._homes() if (found := read_words(home))), {})

    def _homes(self) -> list[Path]:
        return [self.root, self.root.parent / TVQA.name] if self.clips is None else [self.clips]

    def _options(self) -> dict[str, object]:
        return {"clips": str(self.clips)}

    def _scan(self, split: str, fold: int | None) -> Scan:
        watched: list[Path] = []
        found, missing = self._found(split, watched)
        scan = Scan((), "moments in JSON lines, frames in folders", watched=watched)
        scan.names = [name for name, _ in found]
        scan.labels = [-1] * len(found)
        scan.starts = [moment.span[0] for _, moment in found]
        scan.ends = [moment.span[1] for _, moment in found]
        scan.missing_names = missing
        subtitle_notes(scan, self, {moment.clip for _, moment in found})
        return scan

    def _found(self, split: str, watched: list[Path]) -> tuple[list[tuple[str, Moment]], list[str]]:
        path = first_file(self.root, [folder + _FILES[split] for folder in _FOLDERS])
        if path is None:
            raise self._lacks(self.root / _FILES[split], f"the moments of split {split!r} are missing")
        homes = self._homes()
        home, folders = next(
            ((home, own) for home in homes if (own := frame_folders(home, watched)) is not None), (homes[0], None)
        )
        if folders is None:
            raise self._lacks(homes[-1] / "frames_hq", "the frames are missing")
        watched += [path.parent, path]
        found, missing = [], []
        for where, record in read_json_lines(path):
            moment = _moment(record, where, withheld=split == "test")
            folder = folder_of(moment.clip, folders)
            if folder is None:
                missing.append(f"{moment.clip} (moment {moment.number})")
            else:
                # Relative names, even for a sibling folder, are the same on every machine.
                found.append((Path(os.path.relpath(home / folder, self.root)).as_posix(), moment))
        return found, missing


def _moment(record: dict[str, Any], where: str, withheld: bool) -> Moment:
    span = record.get("ts")
    numbers = isinstance(span, list) and all(isinstance(t, int | float) and not isinstance(t, bool) for t in span)
    if not isinstance(span, list) or not numbers or len(span) != 2 or not 0 <= span[0] < span[1]:
        raise ValueError(f'{where}: "ts" must be [start, end] in seconds with start before end, not {span!r}')
    descriptions: tuple[Description, ...] = ()
    if not withheld or record.get("descs"):
        descriptions = tuple(
            Description(
                entry_of(entry, "desc_id", int, where),
                " ".join(entry_of(entry, "desc", str, where).split()),
                str(entry.get("type", "")),
            )
            for entry in objects(record, "descs", where)
        )
        if not descriptions:
            raise ValueError(f'{where}: "descs" is empty; a moment of this split must have a description')
    return Moment(
        entry_of(record, "clip_id", int, where),
        entry_of(record, "vid_name", str, where),
        (float(span[0]), float(span[1])),
        descriptions,
    )
