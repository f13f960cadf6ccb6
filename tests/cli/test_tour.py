"""Run the tour at the smoke scale with stages that are already trained, and run the quickstart notebook's cells."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from assemble.commands.main import main
from assemble.reporting.papers import paper_named, project_root
from common.data.worlds.base import World
from common.models.finished_stage import instantiate
from tests.trained import checkpoint, copied_avid

TOUR = project_root() / "docs" / "tour.md"
QUICKSTART = project_root() / "docs" / "quickstart.ipynb"
TRAINING = {"avid_cma": "avid", "mct": "mct", "m3p": "m3p", "xmc_gan": "xmc_gan", "vx2text": "avsd"}


def run(line: str) -> None:
    """Run a line of a shell block, but only plan the training. The test prepares what the first block sets up."""
    words = shlex.split(line)
    if words[0] in ("make", "export"):
        return
    if words[0] != ".venv/bin/assemble":
        subprocess.run(line, shell=True, check=True)
        return
    if words[1] == "fit":
        words.append("--print_config")
    elif words[1] == "reproduce":
        words[1] = "plan"
    assert main(words[1:]) == 0, line


def test_the_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = TOUR.read_text(encoding="utf-8").replace("mini", "smoke")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 12
    commands = {shlex.split(line)[1] for kind, block in blocks for line in block.splitlines() if ".venv" in line}
    assert {"fit", "reproduce", "embed", "retrieve", "generate", "answer", "export"} == commands

    worlds = tmp_path / "runs" / "tour" / "cache" / "worlds"
    worlds.mkdir(parents=True)
    for paper, stage in TRAINING.items():
        trained = checkpoint(paper).parents[1]
        folder = tmp_path / "runs" / paper / "smoke" / "seed0" / stage
        folder.parent.mkdir(parents=True)
        folder.symlink_to(trained)
        text = (trained / "config.yaml").read_text(encoding="utf-8")
        assert "dirpath: $RUN/checkpoints" in text  # reused as --config, it must not write here
        config = yaml.safe_load(text)
        world = instantiate(config["data"]["init_args"]["world"], World).folder
        (worlds / world.name).symlink_to(world)
        # The tour must have a command that trains this stage.
        assert any(
            {paper, paper_named(paper).short} & set(words[2].split("/")) and stage in {*words, words[2].split("/")[-1]}
            for kind, block in blocks
            if kind == "bash"
            for line in block.splitlines()
            if (words := shlex.split(line)) and words[1:2] in (["fit"], ["reproduce"])
        ), paper

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSEMBLE_CACHE", os.fspath(worlds.parent))
    space: dict[str, Any] = {}
    for kind, block in blocks:
        if kind == "python":
            exec(block, space)
        for line in block.splitlines() if kind == "bash" else ():
            run(line)
    printed = capsys.readouterr().out
    assert "1 of 21 files not fully read" in printed
    written = {path.name for path in (tmp_path / "runs" / "tour").iterdir()}
    assert {"clips.npz", "words.npz", "generated", "avid", "mct"} <= written
    assert (tmp_path / "runs" / "tour" / "avid" / "model.safetensors").is_file()
    assert all(space["axes"][name].has_data() for name in ("clip", "sound", "neighbors", "generated"))


def quickstart() -> list[str]:
    """Return the source of the notebook's code cells, and check that the notebook has no outputs."""
    cells = [
        cell for cell in json.loads(QUICKSTART.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


def test_the_quickstart_trains_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied_avid(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for cell in quickstart():
        exec(cell, space)
    printed = capsys.readouterr().out
    assert "16 stages, 1 done" in printed
    assert "Transfer after pre-training on Kinetics (smoke)" in printed
    assert [[line.get_label() for line in axis.lines] for axis in space["axes"]] == [["avid", "avid_cma"]] * 2
    assert all(len(line.get_xdata()) > 1 for axis in space["axes"] for line in axis.lines)


def test_the_quickstart_installs_a_missing_suite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space: dict[str, Any] = {}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="Set SOURCE to this repository's address"):
        exec(quickstart()[0], space)
    monkeypatch.setattr("sys.executable", shutil.which("echo"))
    exec(quickstart()[0].replace('SOURCE = ""', 'SOURCE = "git+https://host/suite"'), space)
    assert capsys.readouterr().out == "-m pip install --quiet git+https://host/suite\n"
    with pytest.raises(RuntimeError, match="failed, see above"):
        space["run"]("false")
