"""The overview of the data sets and their preparation."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from common.data import listing as listing_module
from common.data.datasets.audioset import AudioSet
from common.data.datasets.coco import COCO
from common.data.datasets.dcase import DCASE2014
from common.data.datasets.esc50 import ESC50
from common.data.datasets.kinetics import Kinetics400
from common.data.datasets.ucf101 import UCF101
from common.data.prepare import check_samples, report
from common.data.worlds.clip_layouts import (
    placeholder,
    write_audioset,
    write_dcase,
    write_esc50,
    write_kinetics,
    write_ucf101,
)
from tests.data.image_layouts import write_coco
from tests.data.media_factory import write_video, write_wav


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing_module, "SETTLED_SECONDS", 0.0)
    return tmp_path / "cache"


def write_sound(path: Path) -> None:
    write_wav(path, seconds=1.2, rate=8_000)


def write_silent_video(path: Path, frames: int = 12) -> None:
    write_video(path, frames / 12, fps=12, size=(32, 32), with_audio=False)


def printed(*datasets, width: int = 220, **options) -> tuple[str, list]:
    stream = io.StringIO()
    statuses = report(list(datasets), Console(file=stream, width=width), **options)
    return stream.getvalue(), statuses


def test_report_shows_present_incomplete_and_missing(tmp_path: Path):
    write_kinetics(tmp_path / "kinetics [x]", folders=["train"])
    text, statuses = printed(
        ESC50(write_esc50(tmp_path / "esc")), Kinetics400(tmp_path / "kinetics [x]"), UCF101(tmp_path / "ucf")
    )
    assert [status.present for status in statuses] == [True, False, False]
    assert [status.name for status in statuses] == ["esc50", "kinetics400", "ucf101"]
    for word in (
        "present",
        "incomplete",
        "missing",
        "all 15",
        "train 4",
        str(tmp_path / "kinetics [x]"),
        "CC BY-NC 3.0",
    ):
        assert word in text
    # How to get what is missing, whole and with its square brackets.
    assert "https://www.crcv.ucf.edu/data/UCF101.php" in text
    assert all(line in text for line in UCF101.expected_layout.splitlines())
    assert "all: 15 clips, published 2,000" in text
    assert "--prepare" in text


def test_report_prints_brackets_as_they_are(tmp_path: Path):
    text, _ = printed(AudioSet(tmp_path / "none"))
    assert all(line in text for line in AudioSet.expected_layout.splitlines())
    assert "[Y]<YTID>" in text


def test_report_fits_a_narrow_terminal(tmp_path: Path):
    text, _ = printed(ESC50(tmp_path / "none"), width=60)
    assert max(len(line) for line in text.splitlines()) <= 60


def test_preparing_indexes_every_part(tmp_path: Path, cache: Path):
    dataset = UCF101(write_ucf101(tmp_path / "ucf", write=write_silent_video))
    text, (status,) = printed(dataset, prepare=True, samples=6)
    assert status.present
    assert len(list((cache / "indices").glob("ucf101-*.json"))) == 6
    assert status.checked > 0
    assert not status.broken
    assert f"Decoded: {status.checked} of {status.checked} files" in text
    assert "--prepare" not in text


def test_preparing_a_missing_set_only_reports_it(tmp_path: Path, cache: Path):
    text, (status,) = printed(ESC50(tmp_path / "none"), prepare=True)
    assert not status.present
    assert status.checked == 0
    assert not cache.exists()
    assert "Get it from" in text


def test_an_index_that_was_not_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing_module, "SETTLED_SECONDS", 60.0)
    text, _ = printed(ESC50(write_esc50(tmp_path / "esc", write=write_sound)), prepare=True, samples=2)
    assert "all: the index was not kept" in text


def test_broken_files_are_named(tmp_path: Path):
    root = write_dcase(tmp_path / "dcase", ["bus", "park"], 2, write=write_sound)
    placeholder(root / "scenes_stereo" / "bus01.wav")
    (root / "scenes_stereo_testset" / "park02.wav").write_bytes(b"")
    text, (status,) = printed(DCASE2014(root), verify=True, samples=8)
    assert status.checked == 8
    assert len(status.broken) == 2
    assert any("bus01.wav" in reason for reason in status.broken)
    assert any("park02.wav" in reason for reason in status.broken)
    assert "Decoded: 6 of 8" in text
    assert "Broken: " in text


def test_a_sample_is_a_fixed_random_choice(tmp_path: Path):
    root = write_esc50(tmp_path / "esc", clips_per_fold=2)
    first, again, other = (check_samples(ESC50(root), 4, seed) for seed in (0, 0, 1))
    # Placeholders all fail, so the failures show what was chosen.
    assert len(first.broken) == first.checked == 4
    assert first.broken == again.broken
    assert first.broken != other.broken


def test_video_without_sound_is_not_broken_but_counted(tmp_path: Path):
    root = write_kinetics(tmp_path / "kinetics", clips_per_class=1, write=write_silent_video)
    text, (status,) = printed(Kinetics400(root), verify=True)
    assert (status.checked, status.broken) == (4, ())
    assert "4 of 4 files tried have no sound" in text


def test_whole_clips_decode_picture_and_sound(tmp_path: Path):
    root = write_kinetics(
        tmp_path / "kinetics", clips_per_class=1, flat=True, write=lambda path: write_video(path, 1.0)
    )
    text, (status,) = printed(Kinetics400(root), prepare=True)
    assert (status.checked, status.broken) == (4, ())
    assert "no sound" not in text


def test_sound_where_video_is_needed_is_broken(tmp_path: Path):
    root = write_audioset(tmp_path / "audioset", naming="{video}.wav", write=write_sound)
    check = check_samples(AudioSet(root), 2)
    assert len(check.broken) == 2
    assert "no video stream" in check.broken[0]


def test_very_short_files_are_decoded_whole(tmp_path: Path):
    root = write_ucf101(tmp_path / "ucf", write=lambda path: write_silent_video(path, frames=1))
    assert not check_samples(UCF101(root), 6).broken


def test_images_are_decoded_and_called_images(tmp_path: Path, cache: Path):
    root = write_coco(tmp_path / "coco", train=4, val=3)
    broken = root / "train2017" / "000000000016.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (root / "val2017" / "000000005000.jpg").unlink()
    text, (status,) = printed(COCO(root), prepare=True, samples=8)
    assert (status.checked, len(status.broken)) == (6, 1)
    assert "000000000016.jpg: cannot be read" in status.broken[0]
    assert "Images" in text
    assert "Clips" not in text
    assert "val: 1 listed images are missing, such as val2017/000000005000.jpg" in text
    assert len(list((cache / "indices").glob("coco-*.json"))) == 2
    text, _ = printed(COCO(root), ESC50(tmp_path / "none"))
    assert "Items" in text
    assert "Clips" not in text


def test_no_torch_before_something_is_decoded():
    code = "import sys, common.data.prepare, common.data.datasets.kinetics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
