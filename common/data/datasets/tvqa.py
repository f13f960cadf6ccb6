"""TVQA: questions about clips of television shows. TVC uses the same frames and subtitles."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.data.annotations import read_json_lines, read_once, single_spaced
from common.data.datasets.base import MediaDataset, Scan, entries, first_of, in_order, prefix_of
from common.data.media import Limits
from common.data.sequences import Packed

#: Letters of a question's five options.
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
# The release omits this prefix from the clips of one show; some copies include it.
_IMPLIED_PREFIX = "bbt_"


@dataclass(frozen=True, slots=True)
class Subtitle:
    """One line of speech with its times in seconds. The text includes the speaker's name if the release gives it."""

    start: float
    end: float
    text: str

    def overlaps(self, limits: Limits) -> bool:
        """Return whether the line is spoken within the limits. A line of zero length counts at its start."""
        return self.start < limits[1] and (self.end > limits[0] or self.start >= limits[0])


class Subtitles(Mapping[str, tuple[Subtitle, ...]]):
    """Subtitles by clip, sorted by time, from lines `{"vid_name": ..., "sub": [{"text", "start", "end"}, ...]}`."""

    def __init__(self, path: Path) -> None:
        lines = dict(read_json_lines(path, _speech))
        self._rows = {clip: row for row, clip in enumerate(lines)}
        self._lines = Packed(lines.values())

    def __getitem__(self, clip: str) -> tuple[Subtitle, ...]:
        return self._lines[self._rows[clip]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _speech(record: dict[str, Any]) -> tuple[str, tuple[Subtitle, ...]]:
    lines = [Subtitle(float(line["start"]), float(line["end"]), single_spaced(line["text"])) for line in record["sub"]]
    return str(record["vid_name"]), tuple(sorted((line for line in lines if line.text), key=lambda line: line.start))


@dataclass(frozen=True, slots=True)
class Question:
    """A question with five options. `answer` is -1 if it is not public. The release's time span ("ts") is not used."""

    number: int
    text: str
    options: tuple[str, ...]
    answer: int
    clip: str


class TVQA(MediaDataset):
    """TVQA: questions with five options about clips of six television shows, with frames and subtitles but no sound.

    A listing has one row per question whose clip exists. The label is the right option, -1 in the test split. Each clip
    has a folder of JPEG files, 3 per second. Clips of The Big Bang Theory have no prefix in their names.

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

    def questions(self, split: str) -> Sequence[Question]:
        """Return the questions of a split, in the order of the listing."""
        split, _ = self._checked(split, None)
        return Packed(in_order(self._found(split, [])))

    def subtitles(self) -> Subtitles:
        return read_subtitles(self._one_of(*_SUBTITLE_FILES, reason="the subtitles are missing"))

    def words(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Return each clip's true words for picture and sound, see :func:`read_words`. Only miniatures have them."""
        return read_words(self.root)

    def _scan(self, split: str, fold: int | None) -> Scan:
        scan = Scan(OPTION_LETTERS, "questions in JSON lines, frames in folders")
        questions = self._found(split, scan.watched)
        for name, question in questions:
            scan.add(name, f"{question.clip} (question {question.number})", label=question.answer)
        subtitle_notes(scan, self, {question.clip for name, question in questions if name is not None})
        return scan

    def _found(self, split: str, watched: list[Path]) -> list[tuple[str | None, Question]]:
        """Return the frame folder and the content of each question. The folder is None if it does not exist."""
        path = self._one_of(*(folder + _FILES[split] for folder in _FOLDERS), reason="the questions are missing")
        folders = frame_folders(self, self.root, watched)
        watched += [path.parent, path]
        questions = read_json_lines(path, functools.partial(_question, withheld=split == "test"))
        return [(folder_of(question.clip, folders), question) for question in questions]


def _question(record: dict[str, Any], withheld: bool) -> Question:
    answer = int(record.get("answer_idx", -1) if withheld else record["answer_idx"])
    if not withheld and not 0 <= answer < len(OPTION_LETTERS):
        raise ValueError(f'"answer_idx" must be 0 to 4, not {answer}')
    return Question(
        int(record["qid"]),
        single_spaced(record["q"]),
        tuple(single_spaced(record[f"a{place}"]) for place in range(len(OPTION_LETTERS))),
        answer,
        str(record["vid_name"]),
    )


# ---------------------------------------------------------------------------------------------------- shared files
def frame_folders(dataset: MediaDataset, home: Path, watched: list[Path]) -> dict[str, str]:
    """Map clips to frame folders, relative to `home`. Add the folders that were read to `watched`."""
    folder = first_of(home, _FRAME_FOLDERS)
    if folder is None:
        raise dataset._lacks(home / "frames_hq", "the frames are missing")
    frames_of: dict[str, str] = {}
    pending = [folder]
    while pending:
        current = pending.pop()
        watched.append(current)
        prefix = prefix_of(current, home)
        for name in entries(current)[0]:
            if name.endswith(_SHOW_SUFFIX):
                pending.append(current / name)
            else:
                frames_of[name] = prefix + name
    return frames_of


def folder_of(clip: str, folders: Mapping[str, str]) -> str | None:
    """Return a clip's frame folder or None. Ignores whether clip and folder names have the show's prefix."""
    other = clip.removeprefix(_IMPLIED_PREFIX) if clip.startswith(_IMPLIED_PREFIX) else _IMPLIED_PREFIX + clip
    return folders.get(clip, folders.get(other))


read_subtitles = read_once()(Subtitles)


def subtitle_notes(scan: Scan, dataset: Any, clips: set[str]) -> None:
    """Add a note on how many clips lack subtitles."""
    try:
        lacking = sorted(clips.difference(dataset.subtitles()))
    except FileNotFoundError:
        scan.notes.append(f"{_SUBTITLE_FILES[0]} is missing: the clips have no speech")
        return
    if lacking:
        scan.notes.append(f"{len(lacking):,} clips have no subtitles, such as {', '.join(lacking[:2])}")


def read_words(root: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Read the true words for picture and sound of each clip from `words.jsonl`. Empty if the file is missing."""
    path = root / "words.jsonl"
    if not path.is_file():
        return {}
    return dict(
        read_json_lines(path, lambda record: (record["vid_name"], (tuple(record["video"]), tuple(record["audio"]))))
    )
