"""The overview of the data sets and their preparation."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from common.data import released_files
from common.data.datasets.base import placeholder
from common.data.datasets.coco import COCO
from common.data.datasets.dcase import DCASE2014, write_dcase
from common.data.datasets.esc50 import ESC50, write_esc50
from common.data.datasets.kinetics import Kinetics400, write_kinetics
from common.data.datasets.ucf101 import UCF101
from common.data.datasets.voc import PascalVOC
from common.data.prepare import report, report_files
from common.data.released_files import ReleasedFile, look_at
from tests.data.image_layouts import write_coco, write_voc
from tests.data.media_factory import write_video, write_wav

pytestmark = pytest.mark.usefixtures("cache")


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
    assert [status.dataset.name for status in statuses] == ["esc50", "kinetics400", "ucf101"]
    # How to get what is missing, whole and with its square brackets.
    for word in ("incomplete", "missing", "all 15", "train 4", str(tmp_path / "kinetics [x]"), "all: 15 clips"):
        assert word in text
    assert all(line in text for line in UCF101.expected_layout.splitlines())


def test_broken_files_are_named(tmp_path: Path):
    root = write_dcase(tmp_path / "dcase", ["bus", "park"], 2, write=write_sound)
    placeholder(root / "scenes_stereo" / "bus01.wav")
    (root / "scenes_stereo_testset" / "park02.wav").write_bytes(b"")
    text, (status,) = printed(DCASE2014(root), prepare=True, samples=8)
    assert status.checked == 8
    assert len(status.broken) == 2
    assert all(any(name in reason for reason in status.broken) for name in ("bus01.wav", "park02.wav"))
    assert "Decoded: 6 of 8" in text


def test_video_without_sound_is_not_broken_but_counted(tmp_path: Path):
    one_frame = lambda path: write_silent_video(path, frames=1)  # noqa: E731 - and it is decoded whole
    root = write_kinetics(tmp_path / "kinetics", clips_per_class=1, write=one_frame)
    text, (status,) = printed(Kinetics400(root), prepare=True)
    assert (status.checked, status.broken) == (4, ())
    assert "4 of 4 files tried have no sound" in text


def test_no_torch_before_something_is_decoded():
    code = "import sys, common.data.prepare, common.data.datasets.kinetics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_checksum_is_named_and_costs_no_other_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    coco, voc = write_coco(tmp_path / "coco"), write_voc(tmp_path / "voc")
    good = f"sha256:{hashlib.sha256(b'archive').hexdigest()[:8]}"  # a prefix is enough
    monkeypatch.setattr("common.data.datasets.coco.ARCHIVES", {"val2017.zip": good, "train2017.zip": good})
    (coco / "val2017.zip").write_bytes(b"archive")
    (coco / "train2017.zip").write_bytes(b"half an arch")
    # What torchvision checks this archive with.
    (voc / "VOCtest_06-Nov-2007.tar").write_bytes(b"")
    text, statuses = printed(COCO(coco), PascalVOC(voc, ["2007"]), prepare=True)
    assert statuses[0].verified == ("val2017.zip",)
    assert "Checksum OK: val2017.zip" in text
    for status, path in zip(statuses, (coco / "train2017.zip", voc / "VOCtest_06-Nov-2007.tar")):
        assert status.present
        assert len(status.corrupt) == 1
        assert f"Problem: {path}: " in text
    # Without being asked, nothing is read.
    assert not printed(COCO(coco))[1][0].corrupt


def test_released_files_are_shown_with_what_they_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = tmp_path / "weights"
    (weights / "t5-base").mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (weights / "t5-base" / name).write_bytes(b"x")
    (weights / "vgg19-dcbb9e9d.pth").write_bytes(b"half")
    digits = hashlib.sha256(b"resnet").hexdigest()[:8]
    own = ReleasedFile(f"weights/resnet50-{digits}.pth", "ResNet", checksum=f"sha256:{digits}")
    known = (own, *released_files.released_files())
    monkeypatch.setattr(released_files, "released_files", lambda: known)
    (weights / f"resnet50-{digits}.pth").write_bytes(b"resnet")
    paths = ["t5-base", "vgg19-dcbb9e9d.pth", f"resnet50-{digits}.pth", "t5-small", "own [1].pt"]
    statuses = [look_at(f"weights/{path}", tmp_path, ("a", "b", "c"), verify=True) for path in paths]
    assert [status.present for status in statuses] == [False, True, True, False, False]
    stream = io.StringIO()
    report_files(statuses, Console(file=stream, width=220))
    text = stream.getvalue()
    where = f"hf download google-t5/t5-small --local-dir {weights / 't5-small'}"
    for word in ("Missing: tokenizer.json", "damaged", "checksum OK", where, "own [1].pt", "a, b and 1"):
        assert word in text
