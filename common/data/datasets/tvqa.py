"""TVQA: questions about clips of television shows, and the frames and subtitles that it shares with TVC."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from common.data.annotations import entry_of, objects, read_json_lines, read_once
from common.data.datasets.base import MediaDataset, Scan, entries, first_file, first_folder, prefix_of
from common.data.media import Limits
from common.data.sequences import MadeOnDemand, Rows

#: Letters of the five options.
OPTION_LETTERS = ("a", "b", "c", "d", "e")

_FILES = {"train": "tvqa_train.jsonl", "val": "tvqa_val.jsonl", "test": "tvqa_test_public.jsonl"}
_FOLDERS = ("", "tvqa_qa_release/", "data/")
_SUBTITLE_FILES = (
    "tvqa_preprocessed_subtitles.jsonl",
    "data/tvqa_preprocessed_subtitles.jsonl",
    "tvqa_subtitles/tvqa_preprocessed_subtitles.jsonl",
)
_FRAME_FOLDERS = ("frames_hq/frames", "frames_hq", "frames", "video_frames")
_SHOW_SUFFIX = "_frames"
# The release omits this prefix for one show's clips; some copies add it.
_IMPLIED_PREFIX = "bbt_"
_SPAN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*-\s*(\d+(?:\.\d*)?|\.\d+)\s*")


@dataclass(frozen=True, slots=True)
class Subtitle:
    """One line of speech, in seconds; the text includes the speaker's name if the release has it."""

    start: float
    end: float
    text: str

    def overlaps(self, limits: Limits) -> bool:
        """Whether it overlaps the limits; a line of zero length counts at its start."""
        return self.start < limits[1] and (self.end > limits[0] or self.start >= limits[0])


class Subtitles(Mapping[str, tuple[Subtitle, ...]]):
    """The subtitles of every clip in order of time, as columns.

    Args:
        path: one JSON object per line: `{"vid_name": ..., "sub": [{"text", "start", "end"}, ...]}`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, int] = {}
        texts: list[list[str]] = []
        times: list[tuple[float, float]] = []
        for where, record in read_json_lines(path):
            clip = entry_of(record, "vid_name", str, where)
            if clip in self._rows:
                raise ValueError(f"{where}: clip {clip!r} occurs twice")
            self._rows[clip] = len(texts)
            lines = sorted(
                (_line(entry, where) for entry in objects(record, "sub", where)), key=lambda line: line.start
            )
            texts.append([line.text for line in lines if line.text])
            times += [(line.start, line.end) for line in lines if line.text]
        self._texts = Rows.texts(texts)
        self._times = np.array(times, dtype=np.float64).reshape(-1, 2)

    def __getitem__(self, clip: str) -> tuple[Subtitle, ...]:
        row = self._rows[clip]
        times = self._times[self._texts.starts[row] : self._texts.starts[row + 1]].tolist()
        return tuple(Subtitle(start, end, text) for (start, end), text in zip(times, self._texts[row]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with five options; `answer` is -1 if withheld, `span` (seconds of the clip) is None if not marked."""

    number: int
    text: str
    options: tuple[str, ...]
    answer: int
    clip: str
    span: Limits | None


class Questions(MadeOnDemand[Question]):
    """Questions as columns; a :class:`Question` is made on demand."""

    def __init__(self, rows: Sequence[Question]) -> None:
        self._texts = Rows.texts((row.text, *row.options, row.clip) for row in rows)
        self._numbers = np.array([(row.number, row.answer) for row in rows], dtype=np.int64).reshape(-1, 2)
        unmarked = (np.nan, np.nan)
        self._spans = np.array([row.span or unmarked for row in rows], dtype=np.float64).reshape(-1, 2)

    @property
    def answers(self) -> npt.NDArray[np.int64]:
        """Position of the right option of every question [N]; -1 if withheld."""
        return self._numbers[:, 1]

    def __len__(self) -> int:
        return len(self._numbers)

    def _item(self, position: int) -> Question:
        text, *options, clip = self._texts[position]
        number, answer = self._numbers[position].tolist()
        start, end = self._spans[position].tolist()
        return Question(number, text, tuple(options), answer, clip, None if np.isnan(start) else (start, end))


class TVQA(MediaDataset):
    """TVQA: questions with five options about clips of six television shows, with frames and subtitles but no sound.

    A listing has one row per question whose clip exists; the label is the right option, -1 in the test split. Frames
    are JPEG files at 3 per second in a folder per clip; names of clips of The Big Bang Theory have no prefix.

    Args:
        span: whether a question is about its marked part of the clip instead of the whole.

    Source: docs/papers/vx2text.md [10].
    """

    name = "tvqa"
    title = "TVQA"
    splits = ("train", "val", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val", "test_public": "test"}
    optional_splits = frozenset({"test"})
    num_classes = len(OPTION_LETTERS)
    published_counts: ClassVar[Mapping[str, int]] = {"train": 122_039, "val": 15_253, "test": 7_623}
    streams = ("video",)
    expected_layout = (
        "tvqa_train.jsonl, tvqa_val.jsonl, tvqa_test_public.jsonl   (here or in tvqa_qa_release/)\n"
        "frames_hq/<show>_frames/<clip>/00001.jpg ...               (3 per second; or frames_hq/<clip>/...)\n"
        "tvqa_preprocessed_subtitles.jsonl                          (from the TVRetrieval repository)"
    )
    size = "43 GB of frames, 60 MB of text"
    license = "CC BY-NC-SA 4.0; frames by signed agreement"
    source = "http://tvqa.cs.unc.edu/download_tvqa.html; subtitles from https://github.com/jayleicn/TVRetrieval"

    def __init__(self, root: str | os.PathLike[str], span: bool = False) -> None:
        super().__init__(root)
        self.span = span

    def questions(self, split: str) -> Questions:
        """The questions of a split, in the order of its listing."""
        split, _ = self._checked(split, None)
        found, _ = self._found(split, [])
        # The order of a listing: by folder, then as in the file.
        return Questions([question for _, question in sorted(found, key=lambda row: row[0])])

    def subtitles(self) -> Subtitles:
        path = first_file(self.root, _SUBTITLE_FILES)
        if path is None:
            raise self._lacks(self.root / _SUBTITLE_FILES[0], "the subtitles are missing")
        return read_subtitles(path)

    def words(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """True categories of picture and sound of every clip; only miniatures have them, see :func:`read_words`."""
        return read_words(self.root)

    def _options(self) -> dict[str, object]:
        return {"span": self.span}

    def _scan(self, split: str, fold: int | None) -> Scan:
        watched: list[Path] = []
        found, missing = self._found(split, watched)
        scan = Scan(OPTION_LETTERS, "questions in JSON lines, frames in folders", watched=watched)
        scan.names = [name for name, _ in found]
        scan.labels = [question.answer for _, question in found]
        scan.missing_names = missing
        if self.span:
            spans = [question.span or (np.nan, np.nan) for _, question in found]
            scan.starts, scan.ends = [start for start, _ in spans], [end for _, end in spans]
        subtitle_notes(scan, self, {question.clip for _, question in found})
        return scan

    def _found(self, split: str, watched: list[Path]) -> tuple[list[tuple[str, Question]], list[str]]:
        """Frame folder and question of clips with frames; clip and number of the other questions."""
        path = first_file(self.root, [folder + _FILES[split] for folder in _FOLDERS])
        if path is None:
            raise self._lacks(self.root / _FILES[split], f"the questions of split {split!r} are missing")
        folders = frame_folders(self.root, watched)
        if folders is None:
            raise self._lacks(self.root / "frames_hq", "the frames are missing")
        watched += [path.parent, path]
        found, missing = [], []
        for where, record in read_json_lines(path):
            question = _question(record, where, withheld=split == "test")
            folder = folder_of(question.clip, folders)
            if folder is None:
                missing.append(f"{question.clip} (question {question.number})")
            else:
                found.append((folder, question))
        return found, missing


def _question(record: dict[str, Any], where: str, withheld: bool) -> Question:
    lacking = [key for key in (f"a{place}" for place in range(len(OPTION_LETTERS))) if key not in record]
    if lacking:
        raise ValueError(f"{where}: the question lacks the options {', '.join(lacking)}; it must have a0 to a4")
    options = tuple(entry_of(record, f"a{place}", str, where) for place in range(len(OPTION_LETTERS)))
    answer = record.get("answer_idx")
    if answer is None and withheld:
        answer = -1
    elif isinstance(answer, bool) or not isinstance(answer, int | str) or str(answer) not in ("0", "1", "2", "3", "4"):
        raise ValueError(f'{where}: "answer_idx" must be 0 to 4, not {json.dumps(answer)}')
    return Question(
        entry_of(record, "qid", int, where),
        " ".join(entry_of(record, "q", str, where).split()),
        tuple(" ".join(option.split()) for option in options),
        int(answer),
        entry_of(record, "vid_name", str, where),
        parse_span(record.get("ts"), where),
    )


def parse_span(text: object, where: str) -> Limits | None:
    """Parse seconds such as `76.01-84.2`; None if empty, `nan`, `nan-nan` or of zero length."""
    if text is None or (isinstance(text, float) and np.isnan(text)):
        return None
    match = _SPAN.fullmatch(text) if isinstance(text, str) else None
    if match is not None:
        start, end = float(match[1]), float(match[2])
        return (start, end) if end > start else None
    if isinstance(text, str) and "nan" in text.lower():
        return None
    raise ValueError(f'{where}: "ts" must be start-end in seconds such as "76.01-84.2", or "nan", not {text!r}')


# ---------------------------------------------------------------------------------------------------- shared files
def frame_folders(home: Path, watched: list[Path]) -> dict[str, str] | None:
    """Frame folders by clip, relative to `home`, or None if there are none; folders read are added to `watched`."""
    folder = first_folder(home, _FRAME_FOLDERS)
    if folder is None:
        return None
    found: dict[str, str] = {}
    pending = [folder]
    while pending:
        current = pending.pop()
        watched.append(current)
        prefix = prefix_of(current, home)
        for name in entries(current)[0]:
            if name.endswith(_SHOW_SUFFIX):
                pending.append(current / name)
            else:
                found[name] = prefix + name
    return found


def folder_of(clip: str, folders: Mapping[str, str]) -> str | None:
    """The folder of a clip's frames, with or without the prefix that the release omits, or None."""
    other = clip.removeprefix(_IMPLIED_PREFIX) if clip.startswith(_IMPLIED_PREFIX) else _IMPLIED_PREFIX + clip
    return folders.get(clip, folders.get(other))


@read_once()
def read_subtitles(path: Path) -> Subtitles:
    """Read subtitles once per process."""
    return Subtitles(path)


def subtitle_notes(scan: Scan, dataset: Any, clips: set[str]) -> None:
    """Note clips without subtitles, which only speech models need."""
    try:
        lacking = sorted(clips.difference(dataset.subtitles()))
    except FileNotFoundError:
        scan.notes.append(f"{_SUBTITLE_FILES[0]} is missing: the clips have no speech")
        return
    if lacking:
        scan.notes.append(f"{len(lacking):,} clips have no subtitles, such as {', '.join(lacking[:2])}")


def read_words(root: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Clip -> words of picture and sound, from `words.jsonl`, which only miniatures have; empty without the file."""
    path = root / "words.jsonl"
    if not path.is_file():
        return {}
    found = {}
    for where, record in read_json_lines(path):
        words = [record.get(key) for key in ("video", "audio")]
        if not all(isinstance(own, list) and all(isinstance(word, str) for word in own) for own in words):
            raise ValueError(f'{where}: "video" and "audio" must be lists of words')
        found[entry_of(record, "vid_name", str, where)] = tuple(words[0] or ()), tuple(words[1] or ())
    return found


def _line(entry: dict[str, Any], where: str) -> Subtitle:
    times = [entry.get("start"), entry.get("end")]
    for time in times:
        if isinstance(time, bool) or not isinstance(time, int | float) or not np.isfinite(time):
            raise ValueError(f'{where}: "start" and "end" must be numbers of seconds, not {time!r}')
    return Subtitle(float(times[0] or 0), float(times[1] or 0), " ".join(entry_of(entry, "text", str, where).split()))
