"""TVQA in its real layout: questions in JSON lines, folders of frames, subtitles."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.annotations import read_json_lines
from common.data.datasets.tvqa import TVQA, Subtitle, parse_span
from common.data.listing import DatasetMissing
from tests.data.text_layouts import question, write_lines, write_tvqa


@pytest.mark.parametrize("flat", [False, True])
def test_rows_and_questions_are_aligned(tmp_path: Path, flat: bool) -> None:
    dataset = TVQA(write_tvqa(tmp_path, flat=flat))
    listing, questions = dataset.listing("train"), dataset.questions("train")
    assert len(listing) == len(questions) == 4
    for clip, asked in zip(listing, questions):
        assert clip.path.name == asked.clip
        assert clip.path.is_dir()
        assert clip.label == asked.answer
        assert (clip.start, clip.end) == (None, None)
    # About one clip, the order of the file stays.
    assert [asked.number for asked in questions] == ([1, 3, 0, 2] if flat else [0, 2, 1, 3])
    first = min(questions, key=lambda asked: asked.number)
    assert first.text == "Who talks in s01e02_seg02_clip_00?"
    assert first.options == tuple(f"Answer {place}" for place in range(5))
    assert first.span == (1.0, 2.5)
    assert listing.classes == ("a", "b", "c", "d", "e")
    assert [asked.answer for asked in questions] == listing.labels.tolist()
    assert [asked.number for asked in dataset.questions("train")[1:3]] == ([3, 0] if flat else [2, 1])


def test_spans_become_limits_when_they_are_used(tmp_path: Path) -> None:
    marked = [question(0, "s01e02_seg02_clip_00"), question(1, "s01e02_seg02_clip_00", ts="nan-nan")]
    dataset = TVQA(write_tvqa(tmp_path, marked), span=True)
    clips = dataset.listing("val")
    assert [(clip.start, clip.end) for clip in clips] == [(1.0, 2.5), (None, None)]
    assert dataset.index_name("val") != TVQA(tmp_path).index_name("val")


def test_withheld_answers(tmp_path: Path) -> None:
    dataset = TVQA(write_tvqa(tmp_path))
    assert dataset.listing("test_public").labels.tolist() == [-1] * 4
    assert dataset.questions("test")[0].answer == -1


def test_clips_of_the_first_show_with_a_prefix(tmp_path: Path) -> None:
    write_tvqa(tmp_path, [question(0, "bbt_s01e02_seg02_clip_00"), question(1, "s01e02_seg02_clip_00")])
    assert len(TVQA(tmp_path).listing("train")) == 2
    folder = tmp_path / "frames_hq/bbt_frames/s01e02_seg02_clip_00"
    folder.rename(folder.with_name("bbt_s01e02_seg02_clip_00"))
    assert len(TVQA(tmp_path).listing("train")) == 2


def test_unknown_clips_are_counted(tmp_path: Path) -> None:
    dataset = TVQA(
        write_tvqa(tmp_path, [question(0, "s01e02_seg02_clip_00"), question(7, "castle_s09e01_seg01_clip_00")])
    )
    listing = dataset.listing("val")
    assert (len(listing), listing.missing) == (1, 1)
    assert listing.missing_names == ("castle_s09e01_seg01_clip_00 (question 7)",)
    assert len(dataset.questions("val")) == 1
    assert any("1 listed clips are missing" in note for note in dataset.status().notes)
    write_lines(tmp_path / "tvqa_val.jsonl", [question(7, "unknown")])
    with pytest.raises(DatasetMissing, match="none of the clips of split 'val' was found"):
        dataset.listing("val")


def test_blank_lines_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"b": "\\u2028"}')
    assert list(read_json_lines(path, dict)) == [{"a": 1}, {"b": "\u2028"}]
    path.write_bytes(b"")
    assert list(read_json_lines(path, dict)) == []


def test_missing_parts_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissing, match="frames_hq/<show>_frames"):
        TVQA(tmp_path / "absent").listing("train")
    write_tvqa(tmp_path)
    for name, message in (
        ("tvqa_preprocessed_subtitles.jsonl", "the subtitles are missing"),
        ("tvqa_val.jsonl", "the questions are missing"),
    ):
        (tmp_path / name).unlink()
        with pytest.raises(DatasetMissing, match=message):
            TVQA(tmp_path).subtitles() if "subtitles" in name else TVQA(tmp_path).questions("val")
    (tmp_path / "frames_hq").rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetMissing, match="the frames are missing"):
        TVQA(tmp_path).listing("train")
    status = TVQA(tmp_path).status()
    assert not status.present
    assert "frames" in status.problem
    with pytest.raises(ValueError, match="has no split"):
        TVQA(tmp_path).questions("dev")


def test_status_of_a_whole_set(tmp_path: Path) -> None:
    status = TVQA(write_tvqa(tmp_path)).status()
    assert status.present
    assert status.counts == {"train": 4, "val": 4, "test": 4}
    assert not any("subtitles" in note for note in status.notes)
    (tmp_path / "tvqa_preprocessed_subtitles.jsonl").unlink()
    assert any("no speech" in note for note in TVQA(tmp_path).status().notes)
    write_lines(tmp_path / "tvqa_preprocessed_subtitles.jsonl", [])
    assert any("2 clips have no subtitles" in note for note in TVQA(tmp_path).status().notes)


def test_subtitles(tmp_path: Path) -> None:
    subtitles = TVQA(write_tvqa(tmp_path)).subtitles()
    assert len(subtitles) == 2
    # In the order of time, line breaks gone, other scripts kept.
    assert subtitles["s01e02_seg02_clip_00"] == (
        Subtitle(0.5, 1.2, "Hello."),
        Subtitle(2.0, 3.0, "(Kate:) Späť, now."),
    )
    assert subtitles.get("unknown", ()) == ()
    assert "unknown" not in subtitles


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


@pytest.mark.parametrize("text", ["nan", "nan-nan", "NaN", "nan-3.0", float("nan"), None, "3-3", "4.5-2"])
def test_unmarked_spans(text: object) -> None:
    assert parse_span(text) is None


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 500), st.floats(0.01, 100))
def test_spans_are_read_back(start: float, length: float) -> None:
    end = start + length
    expected = (round(start, 2), round(end, 2))
    found = parse_span(f"{start:.2f}-{end:.2f}")
    assert found == (expected if expected[1] > expected[0] else None)


@pytest.mark.parametrize("text", ["", "3", "-3-4", "a-b", 5, [1, 2], "1-2-3"])
def test_wrong_spans(text: object) -> None:
    with pytest.raises(ValueError, match='"ts" must be'):
        parse_span(text)


def test_columns_hold_any_text(tmp_path: Path) -> None:
    odd = question(1, "s01e02_seg02_clip_00", q="¿Qué? 例 🙂", a0="", a4="\ud800")
    asked = TVQA(write_tvqa(tmp_path, [odd])).questions("train")[0]
    assert asked.text == "¿Qué? 例 🙂"
    assert asked.options[0] == ""
    assert asked.options[4] == "\ud800"
    with pytest.raises(IndexError):
        TVQA(tmp_path).questions("train")[1]
    assert np.isnan(TVQA(tmp_path).listing("train").numbers["start"]).all()
