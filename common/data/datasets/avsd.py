"""AVSD of the seventh Dialog System Technology Challenge: dialogues about videos of Charades."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from common.data.annotations import read_json, single_spaced
from common.data.datasets.base import VIDEO_SUFFIXES, MediaDataset, Scan, first_of, in_order, walk
from common.data.datasets.tvqa import Subtitles, read_subtitles, read_words
from common.data.listing import DatasetError
from common.files import parsing

#: The release's placeholder for a withheld answer.
UNDISCLOSED = "__UNDISCLOSED__"

_FOLDERS = ("", "data/")
_FILES = {split: f"{split}_set4DSTC7-AVSD.json" for split in ("train", "valid", "test")}
_ANSWERS = ("test_set4DSTC7-AVSD_singref.json", "mock_test_set4DSTC10-AVSD_from_DSTC7_singref.json")
_REFERENCES = ("test_set4DSTC7-AVSD_multiref.json",)
# The test split uses Charades' withheld test videos.
_VIDEO_FOLDERS = ("Charades_v1_480", "Charades_v1", "Charades_vu17_test_480", "Charades_vu17_test", "videos")


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer. The answer is None if it is not public."""

    question: str
    answer: str | None


@dataclass(frozen=True, slots=True)
class Dialog:
    """A dialogue about a video. `references` are answers to the last question, empty if there is no references file.

    `video` is the release's `image_id`. The questioner knows `caption` before the dialogue and writes `summary` after
    it.
    """

    video: str
    caption: str
    summary: str
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()


class AVSD(MediaDataset):
    """AVSD (DSTC7): dialogues of ten questions and answers about 11,000 videos of Charades, which have sound.

    A listing has one row per dialogue whose video exists, including silent videos. The test split lacks the last answer
    of each dialogue. Two optional files contain these answers: one the original answers, the other six references for
    each. The optional `subtitles.jsonl`, in TVQA's format, holds the speech and is not part of the release. `videos` is
    the folder of Charades' videos; None is the root.

    Source: docs/papers/vx2text.md [10].
    """

    name = "avsd"
    title = "AVSD (DSTC7)"
    splits = ("train", "valid", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"val": "valid", "validation": "valid"}
    published_counts: ClassVar[Mapping[str, int]] = {"train": 7_659, "valid": 1_787, "test": 1_710}
    streams = ("video", "audio")
    expected_layout = (
        "train_set4DSTC7-AVSD.json, valid_set4DSTC7-AVSD.json, test_set4DSTC7-AVSD.json    (here or in data/)\n"
        "mock_test_set4DSTC10-AVSD_from_DSTC7_singref.json     (optional: the original answers of the test split)\n"
        "test_set4DSTC7-AVSD_multiref.json                     (optional: its six references)\n"
        "Charades_v1_480/<image_id>.mp4 and Charades_vu17_test_480/<image_id>.mp4   (or without _480)"
    )
    size = "16 GB of videos at 480 pixels, 40 MB of text"
    license = "dialogues for research; Charades non-commercial: check the terms of either"
    source = (
        "https://github.com/hudaAlamri/DSTC7-Audio-Visual-Scene-Aware-Dialog-AVSD-Challenge; "
        "videos from https://prior.allenai.org/projects/charades"
    )

    def __init__(self, root: str | os.PathLike[str], videos: str | os.PathLike[str] | None = None) -> None:
        super().__init__(root)
        self.videos = None if videos is None else Path(videos).expanduser()

    def dialogs(self, split: str) -> list[Dialog]:
        """Return the dialogues of a split, in the order of the listing."""
        split, _ = self._checked(split, None)
        return in_order(self._found(split, []))

    def subtitles(self) -> Subtitles | None:
        """Return the speech in the videos, or None if the optional `subtitles.jsonl` is missing."""
        path = self.root / "subtitles.jsonl"
        return read_subtitles(path) if path.is_file() else None

    def words(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        return read_words(self.root)

    def _options(self) -> dict[str, object]:
        return {"videos": str(self.videos)}

    def _scan(self, split: str, fold: int | None) -> Scan:
        scan = Scan((), "dialogues in JSON, videos of Charades")
        for name, dialog in self._found(split, scan.watched):
            scan.add(name, dialog.video)
        if split == "test":
            for names, lacking in ((_ANSWERS, "last answers"), (_REFERENCES, "six references")):
                if self._file(names) is None:
                    scan.notes.append(f"{names[-1]} is missing: the {lacking} of the test split are unknown")
        return scan

    def _file(self, names: tuple[str, ...]) -> Path | None:
        return first_of(self.root, [folder + name for name in names for folder in _FOLDERS])

    def _found(self, split: str, watched: list[Path]) -> list[tuple[str | None, Dialog]]:
        """Return the video and the content of each dialogue. The video is None if the file does not exist."""
        path = self._one_of(*(folder + _FILES[split] for folder in _FOLDERS), reason="the dialogues are missing")
        videos = self._videos(watched)
        watched += [path.parent, path]
        dialogs = _dialogs(path)
        if split == "test":
            for names, merge in ((_ANSWERS, _disclosed), (_REFERENCES, _referenced)):
                extra = self._file(names)
                if extra is not None:
                    watched.append(extra)
                    dialogs = merge(dialogs, path, extra)
        return [(videos.get(dialog.video), dialog) for dialog in dialogs]

    def _videos(self, watched: list[Path]) -> dict[str, str]:
        """Map names of videos to file names relative to the root."""
        home = self.root if self.videos is None else self.videos
        folders = [home / name for name in _VIDEO_FOLDERS if (home / name).is_dir()]
        if not folders and self.videos is not None and home.is_dir():
            folders = [home]
        if not folders:
            raise self._lacks(home / _VIDEO_FOLDERS[0], "the videos are missing")
        files: dict[str, str] = {}
        for folder in folders:
            prefix = Path(os.path.relpath(folder, self.root)).as_posix()
            for name, stem in walk(folder, VIDEO_SUFFIXES, watched):
                files.setdefault(stem, f"{prefix}/{name}")
        return files


def _dialogs(path: Path) -> list[Dialog]:
    with parsing(path, DatasetError):
        dialogs = [
            Dialog(
                str(entry["image_id"]),
                single_spaced(entry.get("caption", "")),
                single_spaced(entry.get("summary", "")),
                tuple(_turn(turn["question"], turn["answer"]) for turn in entry["dialog"]),
            )
            for entry in read_json(path)["dialogs"]
        ]
        if silent := next((dialog.video for dialog in dialogs if not dialog.turns), None):
            raise ValueError(f"the dialogue about {silent} has no turns")
        return dialogs


def _turn(question: str, answer: str) -> Turn:
    answer = single_spaced(answer)
    return Turn(single_spaced(question), None if answer == UNDISCLOSED else answer)


def _disclosed(dialogs: list[Dialog], path: Path, answers: Path) -> list[Dialog]:
    """Insert the original last answers into the test dialogues."""
    answer_dialogs = _dialogs(answers)

    def asked(dialog: Dialog) -> tuple[str, int, str]:
        return dialog.video, len(dialog.turns), dialog.turns[-1].question

    if list(map(asked, answer_dialogs)) != list(map(asked, dialogs)):
        raise DatasetError(f"{answers} is about other dialogues than {path}; remove it, or download both again")
    disclosed = []
    for dialog, other in zip(dialogs, answer_dialogs):
        last = dialog.turns[-1]
        answered = replace(last, answer=last.answer or other.turns[-1].answer)
        disclosed.append(replace(dialog, turns=(*dialog.turns[:-1], answered)))
    return disclosed


def _referenced(dialogs: list[Dialog], path: Path, references: Path) -> list[Dialog]:
    """Insert the references of the last answers into the test dialogues; both files have the same order."""
    with parsing(references, DatasetError):
        document = read_json(references)
        names = {image["id"]: image.get("name") or "" for image in document["images"]}
        texts: dict[int, list[str]] = {number: [] for number in names}
        for entry in document["annotations"]:
            texts[entry["image_id"]].append(single_spaced(entry["caption"]))
    videos = [names[number].rpartition("_")[0] for number in sorted(names)]
    if len(videos) != len(dialogs) or any(name not in ("", dialog.video) for name, dialog in zip(videos, dialogs)):
        raise DatasetError(f"{references} is about other dialogues than {path}; remove it, or download both again")
    return [replace(dialog, references=tuple(texts[number])) for number, dialog in zip(sorted(texts), dialogs)]
