"""Test the readers of TVQA, TVC and AVSD: questions, moments and dialogues about clips."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.data.annotations import read_json, read_json_lines
from common.data.datasets.avsd import AVSD
from common.data.datasets.tvqa import TVQA, Subtitle
from common.data.listing import DatasetMissing
from tests.data.text_layouts import (
    REFERENCES,
    question,
    references,
    write_avsd,
    write_json,
    write_lines,
    write_tvqa,
)


# ---------------------------------------------------------------------------------------------------------------- TVQA
def test_clips_of_the_first_show_with_a_prefix(tmp_path: Path) -> None:
    write_tvqa(tmp_path, [question(0, "bbt_s01e02_seg02_clip_00"), question(1, "s01e02_seg02_clip_00")])
    assert len(TVQA(tmp_path).listing("train")) == 2
    folder = tmp_path / "frames_hq/bbt_frames/s01e02_seg02_clip_00"
    folder.rename(folder.with_name("bbt_s01e02_seg02_clip_00"))
    assert len(TVQA(tmp_path).listing("train")) == 2


def test_blank_lines_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"b": "\\u2028"}')
    assert list(read_json_lines(path, dict)) == [{"a": 1}, {"b": "\u2028"}]
    path.write_text('{"a": 1, "mask": [{"b": 2}]}')
    assert read_json(path, frozenset({"mask"})) == {"a": 1}
    path.write_bytes(b"")
    assert list(read_json_lines(path, dict)) == []


@pytest.mark.parametrize(
    ("line", "limits", "expected"),
    [
        ((1.0, 2.0), (0.0, 1.0), False),
        ((1.0, 2.0), (0.0, 1.01), True),
        ((1.0, 2.0), (2.0, 3.0), False),
        ((1.0, 2.0), (1.9, 3.0), True),
        ((1.0, 2.0), (1.2, 1.3), True),
        ((1.0, 1.0), (1.0, 2.0), True),
        ((1.0, 1.0), (0.0, 1.0), False),
    ],
)
def test_overlap(line: tuple[float, float], limits: tuple[float, float], expected: bool) -> None:
    assert Subtitle(*line, "text").overlaps(limits) is expected


# ---------------------------------------------------------------------------------------------------------------- AVSD
def test_videos_of_full_size(tmp_path: Path) -> None:
    dataset = AVSD(write_avsd(tmp_path, suffix=""))
    assert [own.video for own in dataset.dialogs("validation")] == ["BBBB2"]
    assert [clip.path.stem for clip in dataset.listing("test")] == ["CCCC3", "ZZZZ9"]


def test_withheld_answers_with_and_without_the_files_that_tell_them(tmp_path: Path) -> None:
    dataset = AVSD(write_avsd(tmp_path, answers=False))
    first, second = dataset.dialogs("test")
    assert (first.video, second.video) == ("CCCC3", "ZZZZ9")
    assert second.turns[0].answer == "it is 0 ."
    assert (first.turns[-1].answer, second.turns[-1].answer) == (None, None)
    assert sum("of the test split are unknown" in note for note in dataset.status().notes) == 2
    write_avsd(tmp_path)
    first, second = dataset.dialogs("test")
    assert (first.turns[-1].answer, second.turns[-1].answer) == ("answer two", "answer one")
    assert second.references == tuple(f"reference {place} of ZZZZ9_3" for place in range(6))
    assert not any("unknown" in note for note in dataset.status().notes)
    unnamed = references(["ZZZZ9_3", "CCCC3_1"], count=2)
    unnamed["images"] = [{"id": image["id"]} for image in reversed(unnamed["images"])]
    write_json(tmp_path / REFERENCES, unnamed)
    assert dataset.dialogs("test")[1].references[0] == "reference 0 of ZZZZ9_3"


def test_videos_elsewhere_and_missing_ones(tmp_path: Path) -> None:
    root, films = write_avsd(tmp_path / "avsd"), tmp_path / "charades"
    films.mkdir()
    for folder in ("Charades_v1_480", "Charades_vu17_test_480"):
        (root / folder).rename(films / folder)
    with pytest.raises(DatasetMissing, match="the videos are missing"):
        AVSD(root).listing("test")
    dataset = AVSD(root, videos=films)
    assert dataset.listing("train")[0].path == films / "Charades_v1_480/AAAA1.mp4"
    (films / "Charades_v1_480/AAAA1.mp4").unlink()
    assert len(dataset.dialogs("train")) == 1
    # The data set also accepts the folder that directly holds the files.
    assert len(AVSD(root, videos=films / "Charades_v1_480").listing("train")) == 1


def test_speech_that_was_recognized(tmp_path: Path) -> None:
    dataset = AVSD(write_avsd(tmp_path))
    assert dataset.subtitles() is None
    write_lines(tmp_path / "subtitles.jsonl", [{"vid_name": "A", "sub": [{"text": "hi", "start": 0, "end": 1}]}])
    subtitles = dataset.subtitles()
    assert subtitles is not None
    assert subtitles["A"][0].text == "hi"
