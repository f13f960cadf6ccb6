"""Test the overview of data sets and released files."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.data import overview
from common.data.datasets.base import DatasetStatus, MediaDataset
from common.data.datasets.dcase import DCASE2014
from common.data.overview import ReleasedFile, look_at, report, report_files

pytestmark = pytest.mark.usefixtures("cache")


class Stated(DCASE2014):
    """A data set whose status the test provides."""

    title, size, license, source = "Known", "1 GB", "mine", "here"
    expected_layout, further_layout = "a/\nb/", "regions/"

    def __init__(self, **status: Any) -> None:
        super().__init__("/known [x]")
        self.status = lambda: DatasetStatus(self, **status)  # type: ignore[method-assign]


def printed(*datasets: MediaDataset) -> tuple[str, list[DatasetStatus]]:
    console = Console(file=io.StringIO(), width=400, record=True)
    statuses = report(datasets, console)
    return console.export_text(styles=True), statuses


def told(title: str, state: str, *lines: str) -> list[str]:
    """Format an entry of the overview as `report` prints it. `state` begins with its color code."""
    return [f"\x1b[1m{title}\x1b[0m: \x1b[{state}\x1b[0m", *(f"  {line}" for line in lines)]


def test_the_overview_says_what_is_there_and_how_to_get_the_rest() -> None:
    whole = {"layout": "", "counts": {"all": 1}}
    text, statuses = printed(
        Stated(layout="folders", counts={"train": 1234, "test": 2}),
        Stated(**whole, notes=("one", "two")),
        Stated(**whole, problems=["no test\n  Layout", "no list"]),
        *[Stated(layout="", counts={}, problems=["nothing"])] * 2,  # printed once
    )
    assert [status.present for status in statuses] == [True, True, False, False, False]
    place, terms, source = "Path: /known [x]", ["Size: 1 GB", "License: mine"], "Get it from: here"
    one = [place, "Clips: all 1", *terms]
    lacking = ["Expected:", "  a/", "  b/", "  regions/", source]
    assert text.splitlines() == [
        *told("Known", "32mpresent", place, "Clips: train 1,234, test 2", "Layout: folders", *terms, source),
        *told("Known", "33mpresent", *one, source, "Note: one", "Note: two"),
        *told("Known", "33mincomplete", *one, "no test", *lacking),
        *told("Known", "31mmissing", place, *terms, "nothing", *lacking),
    ]


def test_the_overview_loads_no_torch():
    code = "import sys, common.data.overview, common.data.datasets.kinetics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_released_files_are_shown_with_what_they_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = tmp_path / "weights"
    known = (
        ReleasedFile("weights/t5*", "T5", "1 GB", "free", "get {path}", ("config.json", "a.bin|b.bin")),
        ReleasedFile("weights/resnet-*.pth", "ResNet", source="the hub"),
    )
    monkeypatch.setattr(overview, "released_files", lambda: known)
    for name, content in (("t5/config.json", b""), ("resnet-a.pth", b"resnet"), ("resnet-b.pth", b"half")):
        (weights / name).parent.mkdir(parents=True, exist_ok=True)
        (weights / name).write_bytes(content)
    names = ["t5", "t5-small", "resnet-a.pth", "resnet-b.pth", "own [1].pt"]
    statuses = [look_at(f"weights/{name}", tmp_path, ("a", "b", "c")) for name in names]
    statuses.append(look_at("weights/resnet-b.pth", tmp_path, ("a", "b")))
    assert [status.present for status in statuses] == [False, False, True, True, False, True]
    console = Console(file=io.StringIO(), width=400, record=True)
    report_files([], console)
    report_files(statuses, console)
    paths, terms, read = [f"Path: {weights / name}" for name in names], ["Size: 1 GB", "License: free"], "Read by: a, b"
    unknown, three = ["Size: unknown", "License: unknown"], f"{read} and 1 more"
    lacking, get = "Missing: a.bin or b.bin", f"Get it from: get {weights}"
    assert console.export_text(styles=True).splitlines() == [
        "\x1b[3mWeights and other files\x1b[0m",
        *told("T5", "31mincomplete", paths[0], *terms, three, lacking, f"{get}/t5"),
        *told("T5", "31mmissing", paths[1], *terms, three, "Missing: config.json, a.bin or b.bin", f"{get}/t5-small"),
        *told("ResNet", "32mpresent", paths[2], *unknown, three),
        *told("ResNet", "32mpresent", paths[3], *unknown, three),
        *told("own [1].pt", "31mmissing", paths[4], *unknown, three, "Get it from: the recipe's own file"),
        *told("ResNet", "32mpresent", paths[3], *unknown, read),
    ]
