"""AVSD (DSTC7) in its real layout: dialogues in JSON, videos of Charades, answers of the test split apart."""

from pathlib import Path

import pytest

from common.data.datasets.avsd import AVSD
from common.data.listing import DatasetMissing
from common.data.prepare import check_samples
from tests.data.text_layouts import REFERENCES, references, write_avsd, write_json, write_lines


@pytest.mark.parametrize("suffix", ["_480", ""])
def test_rows_and_dialogues_are_aligned(tmp_path: Path, suffix: str) -> None:
    dataset = AVSD(write_avsd(tmp_path, suffix))
    for split, count in (("train", 2), ("validation", 1), ("test", 2)):
        listing, dialogs = dataset.listing(split), dataset.dialogs(split)
        assert len(listing) == len(dialogs) == count
        assert [clip.path.stem for clip in listing] == [own.video for own in dialogs]
        assert all(clip.path.is_file() for clip in listing)
    own = dataset.dialogs("train")[1]
    assert own.video == "YSKX3"
    assert (own.caption, own.summary) == ("a man sits .", "he eats .")
    assert len(own.turns) == 10
    assert own.turns[-1].answer == "he eats ."
    assert own.references == ()
    assert dataset.subtitles() is None


def test_withheld_answers_with_and_without_the_files_that_tell_them(tmp_path: Path) -> None:
    dataset = AVSD(write_avsd(tmp_path, answers=False))
    first, second = dataset.dialogs("test")
    assert (first.video, second.video) == ("CCCC3", "ZZZZ9")
    assert second.turns[0].answer == "it is 0 ."
    assert (first.turns[-1].answer, second.turns[-1].answer) == (None, None)
    assert sum("of the test split are not known" in note for note in dataset.status().notes) == 2
    write_avsd(tmp_path)
    first, second = dataset.dialogs("test")
    assert (first.turns[-1].answer, second.turns[-1].answer) == ("answer two", "answer one")
    assert second.references == tuple(f"reference {place} of ZZZZ9_3" for place in range(6))
    assert not any("not known" in note for note in dataset.status().notes)


def test_references_without_names(tmp_path: Path) -> None:
    dataset = AVSD(write_avsd(tmp_path))
    unnamed = references(["ZZZZ9_3", "CCCC3_1"], count=2)
    unnamed["images"] = [{"id": image["id"]} for image in reversed(unnamed["images"])]
    write_json(tmp_path / REFERENCES, unnamed)
    assert dataset.dialogs("test")[1].references[0] == "reference 0 of ZZZZ9_3"


def test_missing_parts(tmp_path: Path) -> None:
    dataset = AVSD(write_avsd(tmp_path))
    (tmp_path / "train_set4DSTC7-AVSD.json").unlink()
    with pytest.raises(DatasetMissing, match="the dialogues are missing"):
        dataset.listing("train")
    for folder in ("Charades_v1_480", "Charades_vu17_test_480"):
        (tmp_path / folder).rename(tmp_path / f"no {folder}")
    with pytest.raises(DatasetMissing, match="the videos are missing"):
        dataset.listing("test")


def test_videos_elsewhere_and_missing_ones(tmp_path: Path) -> None:
    root = write_avsd(tmp_path / "avsd")
    films = tmp_path / "charades"
    films.mkdir()
    for folder in ("Charades_v1_480", "Charades_vu17_test_480"):
        (root / folder).rename(films / folder)
    dataset = AVSD(root, videos=films)
    assert len(dataset.listing("train")) == 2
    assert dataset.listing("train")[0].path == films / "Charades_v1_480/AAAA1.mp4"
    (films / "Charades_v1_480/AAAA1.mp4").unlink()
    listing = dataset.listing("train")
    assert (len(listing), listing.missing, listing.missing_names) == (1, 1, ("AAAA1",))
    assert len(dataset.dialogs("train")) == 1
    # The folder of the files themselves is taken as well.
    assert len(AVSD(root, videos=films / "Charades_v1_480").listing("train")) == 1


def test_status_and_a_look_at_the_files(tmp_path: Path) -> None:
    dataset = AVSD(write_avsd(tmp_path))
    status = dataset.status()
    assert status.present
    assert status.counts == {"train": 2, "valid": 1, "test": 2}
    verdicts = check_samples(dataset, samples=6)
    assert verdicts.count("no sound") == 2
    assert set(verdicts) == {"", "no sound"}


def test_speech_that_was_recognized(tmp_path: Path) -> None:
    write_lines(tmp_path / "subtitles.jsonl", [{"vid_name": "A", "sub": [{"text": "hi", "start": 0, "end": 1}]}])
    subtitles = AVSD(write_avsd(tmp_path)).subtitles()
    assert subtitles is not None
    assert subtitles["A"][0].text == "hi"
