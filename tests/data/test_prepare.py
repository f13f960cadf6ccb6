"""The overview of the data sets and their preparation."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.data import released_files
from common.data.datasets.base import DatasetStatus, MediaDataset, placeholder
from common.data.datasets.coco import COCO
from common.data.datasets.dcase import DCASE2014, write_dcase
from common.data.datasets.folder import FolderOfClips
from common.data.datasets.voc import PascalVOC
from common.data.media import MediaFile
from common.data.prepare import report, report_files
from common.data.released_files import ReleasedFile, look_at
from tests.data.image_layouts import write_coco, write_voc
from tests.data.media_factory import write_video, write_wav

pytestmark = pytest.mark.usefixtures("cache")


def write_sound(path: Path) -> None:
    write_wav(path, seconds=1.2, rate=8_000)


class Stated(DCASE2014):
    """A data set whose status is given."""

    title, size, license, source = "Known", "1 GB", "mine", "here"
    expected_layout, further_layout = "a/\nb/", "regions/"

    def __init__(self, **status: Any) -> None:
        super().__init__("/known [x]")
        self.status = lambda: DatasetStatus(self, **status)  # type: ignore[method-assign]


def printed(*datasets: MediaDataset, **options: Any) -> tuple[str, list[DatasetStatus]]:
    console = Console(file=io.StringIO(), width=400, record=True)
    statuses = report(datasets, console, **options)
    return console.export_text(styles=True), statuses


def told(title: str, state: str, *lines: str) -> list[str]:
    """One entry of the overview; `state` begins with the code of its color."""
    return [f"\x1b[1m{title}\x1b[0m: \x1b[{state}\x1b[0m", *(f"  {line}" for line in lines)]


def test_the_overview_says_what_is_there_and_how_to_get_the_rest() -> None:
    whole = {"layout": "", "counts": {"all": 1}}
    text, statuses = printed(
        Stated(layout="folders", counts={"train": 1234, "test": 2}),
        Stated(**whole, notes=("one", "two")),
        Stated(**whole, broken=("c.wav: cut",), checked=3),
        Stated(**whole, corrupt=("d.zip: other",), verified=("e.zip", "f.zip")),
        Stated(**whole, problems=["no test\n  Layout", "no list"]),
        Stated(layout="", counts={}, problems=["nothing"]),
    )
    assert [status.present for status in statuses] == [True, True, True, True, False, False]
    place, terms, source = "Path: /known [x]", ["Size: 1 GB", "License: mine"], "Get it from: here"
    one = [place, "Clips: all 1", *terms]
    lacking = ["Expected:", "  a/", "  b/", "  regions/", source]
    hint = "Add --prepare to decode a sample of the files and compare checksums."
    assert text.splitlines() == [
        *told("Known", "32mpresent", place, "Clips: train 1,234, test 2", "Layout: folders", *terms, source),
        *told("Known", "33mpresent", *one, source, "Note: one", "Note: two"),
        *told("Known", "33mpresent", *one, source, "Decoded: 2 of 3 files tried", "Broken: c.wav: cut"),
        *told("Known", "33mpresent", *one, source, "Checksum OK: e.zip, f.zip", "Problem: d.zip: other"),
        *told("Known", "33mincomplete", *one, "no test", *lacking),
        *told("Known", "31mmissing", place, *terms, "nothing", *lacking),
        hint,
    ]
    for prepare in (False, True):  # nothing
        assert printed(Stated(layout="", counts={}), prepare=prepare)[0].endswith("Get it from: here\n")


def test_broken_files_are_named(tmp_path: Path):
    root = write_dcase(tmp_path / "dcase", ["bus", "park"], 2, write=write_sound)
    broken = [root / "scenes_stereo" / "bus01.wav", root / "scenes_stereo_testset" / "park02.wav"]
    for path in broken:
        placeholder(path)
    text, (status,) = printed(DCASE2014(root), prepare=True, samples=5)  # three and two of four each
    assert [reason.split(": ")[0] for reason in status.broken] == [str(path) for path in broken]
    assert "Decoded: 3 of 5" in text
    assert "--prepare" not in text


def test_half_a_second_from_the_middle_of_each_file_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoded: list[tuple[Any, ...]] = []
    for name in ("read_video", "read_audio"):
        read = getattr(MediaFile, name)
        noted = lambda media, *limits, read=read: decoded.append((media.path.name, *limits)) or read(media, *limits)  # noqa: E731
        monkeypatch.setattr(MediaFile, name, noted)
    for number, (seconds, sound) in enumerate([(3.0, True), (0.2, False), (1.0, True), (0.04, False)]):
        write_video(tmp_path / f"{number}.mkv", seconds, with_audio=sound)
    write_wav(tmp_path / "3.wav", seconds=2.0)
    text, (status,) = printed(FolderOfClips(tmp_path), prepare=True)
    assert decoded == [
        ("0.mkv", 1.5, 0.5, 16.0),
        ("0.mkv", 1.5, 0.5, 16_000),
        ("1.mkv", 0.0, 0.2, 16.0),
        ("2.mkv", 0.5, 0.5, 16.0),
        ("2.mkv", 0.5, 0.5, 16_000),
        ("3.mkv", 0.0, 0.0625, 16.0),
        ("3.wav", 1.0, 0.5, 16_000),
    ]
    assert (status.checked, status.broken) == (4, ())
    assert "Note: 1 of 4 files tried have no sound; recipes that need it skip them" in text


def test_no_torch_before_something_is_decoded():
    code = "import sys, common.data.prepare, common.data.datasets.kinetics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_checksum_is_named_and_costs_no_other_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    coco, voc = write_coco(tmp_path / "coco"), write_voc(tmp_path / "voc")
    good = f"sha256:{hashlib.sha256(b'archive').hexdigest()[:8]}"  # a prefix is enough
    monkeypatch.setattr(COCO, "checksums", lambda self: {"val2017.zip": good, "train2017.zip": good})
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
    weights, digits = tmp_path / "weights", hashlib.sha256(b"resnet").hexdigest()[:8]
    known = (
        ReleasedFile("weights/t5*", "T5", "1 GB", "free", "get {path}", ("config.json", "a.bin|b.bin")),
        ReleasedFile("weights/resnet-*.pth", "ResNet", source="the hub", checksum=f"sha256:{digits}"),
    )
    monkeypatch.setattr(released_files, "released_files", lambda: known)
    for name, content in (("t5/config.json", b""), ("resnet-a.pth", b"resnet"), ("resnet-b.pth", b"half")):
        (weights / name).parent.mkdir(parents=True, exist_ok=True)
        (weights / name).write_bytes(content)
    names = ["t5", "t5-small", "resnet-a.pth", "resnet-b.pth", "own [1].pt"]
    statuses = [look_at(f"weights/{name}", tmp_path, ("a", "b", "c"), verify=True) for name in names]
    statuses.append(look_at("weights/resnet-b.pth", tmp_path, ("a", "b")))
    assert [status.present for status in statuses] == [False, False, True, True, False, True]
    console = Console(file=io.StringIO(), width=400, record=True)
    report_files([], console)
    report_files(statuses, console)
    paths, terms, read = [f"Path: {weights / name}" for name in names], ["Size: 1 GB", "License: free"], "Read by: a, b"
    unknown, three = ["Size: unknown", "License: unknown"], f"{read} and 1 more"
    problem = f"Problem: its sha256 is a11ae064, expected {digits}: damaged, or another version"
    lacking, get = "Missing: a.bin or b.bin", f"Get it from: get {weights}"
    assert console.export_text(styles=True).splitlines() == [
        "\x1b[3mWeights and other files\x1b[0m",
        *told("T5", "31mincomplete", paths[0], *terms, three, lacking, f"{get}/t5"),
        *told("T5", "31mmissing", paths[1], *terms, three, "Missing: config.json, a.bin or b.bin", f"{get}/t5-small"),
        *told("ResNet", "32mpresent, checksum OK", paths[2], *unknown, three),
        *told("ResNet", "31mdamaged", paths[3], *unknown, three, problem, "Get it from: the hub"),
        *told("own [1].pt", "31mmissing", paths[4], *unknown, three, "Get it from: the recipe's own file"),
        *told("ResNet", "32mpresent", paths[3], *unknown, read),
    ]
