"""Questions, moments and dialogues of clips: TVQA, TVC and AVSD in their real layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.data.annotations import read_json, read_json_lines
from common.data.datasets.avsd import AVSD
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA, Subtitle
from common.data.listing import DatasetMissing
from common.data.prepare import check_samples
from tests.data.text_layouts import (
    CLIPS,
    REFERENCES,
    question,
    references,
    write_avsd,
    write_json,
    write_lines,
    write_tvc,
    write_tvqa,
)


# ---------------------------------------------------------------------------------------------------------------- TVQA
@pytest.mark.parametrize("flat", [False, True])
def test_rows_and_questions_are_aligned(tmp_path: Path, flat: bool) -> None:
    dataset = TVQA(write_tvqa(tmp_path, flat=flat))
    listing, questions = dataset.listing("train"), dataset.questions("train")
    for clip, asked in zip(listing, questions, strict=True):
        assert clip.path.name == asked.clip
        assert clip.label == asked.answer
        assert (clip.start, clip.end) == (None, None)
    # About one clip, the order of the file stays.
    assert [asked.number for asked in questions] == ([1, 3, 0, 2] if flat else [0, 2, 1, 3])
    first = min(questions, key=lambda asked: asked.number)
    assert first.text == "Who talks in s01e02_seg02_clip_00?"
    assert first.options == tuple(f"Answer {place}" for place in range(5))
    assert listing.classes == ("a", "b", "c", "d", "e")
    assert [asked.number for asked in questions[1:3]] == ([3, 0] if flat else [2, 1])
    assert dataset.listing("test_public").labels.tolist() == [-1] * 4
    assert dataset.questions("test")[0].answer == -1


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


def test_subtitles(tmp_path: Path) -> None:
    subtitles = TVQA(write_tvqa(tmp_path)).subtitles()
    assert len(subtitles) == 2
    # In the order of time, line breaks gone, other scripts kept.
    assert subtitles[CLIPS[0]] == (Subtitle(0.5, 1.2, "Hello."), Subtitle(2.0, 3.0, "(Kate:) Späť, now."))
    assert subtitles.get("unknown", ()) == ()


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


# ----------------------------------------------------------------------------------------------------------------- TVC
@pytest.fixture(params=["beside", "named"])
def tvc(request: pytest.FixtureRequest, tmp_path: Path) -> TVC:
    """Frames and subtitles in the folder of TVQA beside it, or in another one."""
    root = write_tvc(tmp_path / "tvc")
    clips = {"beside": tmp_path / "tvqa", "named": tmp_path / "elsewhere/films"}[request.param]
    write_tvqa(clips)
    return TVC(root, clips if request.param == "named" else None)


def test_rows_and_moments_are_aligned(tvc: TVC) -> None:
    for split, count in (("train", 2), ("val", 4)):
        moments = tvc.moments(split)
        for clip, own in zip(tvc.listing(split), moments, strict=True):
            assert clip.path.name == own.clip
            assert (clip.start, clip.end) == own.span
            assert len(own.descriptions) == count
        assert len(moments) == 4
    assert moments[0].descriptions[1].text.startswith("Moment ")
    assert "  " not in moments[0].descriptions[0].text
    assert moments[0].descriptions[0].kind == "vt"
    assert len(tvc.subtitles()[CLIPS[0]]) == 2
    assert tvc.words() == {}
    assert [own.descriptions for own in tvc.moments("test_public")] == [(), ()]
    assert tvc.status().counts == {"train": 4, "val": 4, "test": 2}


# ---------------------------------------------------------------------------------------------------------------- AVSD
@pytest.mark.parametrize("suffix", ["_480", ""])
def test_rows_and_dialogues_are_aligned(tmp_path: Path, suffix: str) -> None:
    dataset = AVSD(write_avsd(tmp_path, suffix))
    for split, count in (("train", 2), ("validation", 1), ("test", 2)):
        videos = [own.video for own in dataset.dialogs(split)]
        assert [clip.path.stem for clip in dataset.listing(split)] == videos
        assert len(videos) == count
    own = dataset.dialogs("train")[1]
    assert own.video == "YSKX3"
    assert (own.caption, own.summary) == ("a man sits .", "he eats .")
    assert len(own.turns) == 10
    assert own.turns[-1].answer == "he eats ."
    assert own.references == ()
    assert sorted(check_samples(dataset, samples=6)) == ["", "", "", "no sound", "no sound"]


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
    # The folder of the files themselves is taken as well.
    assert len(AVSD(root, videos=films / "Charades_v1_480").listing("train")) == 1


def test_speech_that_was_recognized(tmp_path: Path) -> None:
    dataset = AVSD(write_avsd(tmp_path))
    assert dataset.subtitles() is None
    write_lines(tmp_path / "subtitles.jsonl", [{"vid_name": "A", "sub": [{"text": "hi", "start": 0, "end": 1}]}])
    subtitles = dataset.subtitles()
    assert subtitles is not None
    assert subtitles["A"][0].text == "hi"
