"""Test reading runs from their folders, and the command that lists and compares runs."""

from __future__ import annotations

import fcntl
import json
import re
from pathlib import Path

import pytest
import yaml

from assemble.commands.main import main
from assemble.reporting.curves import summaries
from assemble.reporting.runs import DONE, RUNNING, STOPPED, find_runs
from tests.reporting.conftest import Capsys, Saved


@pytest.fixture
def folder(project: Path, saved: Saved) -> Path:
    """Make three finished runs, one of them with curves and overrides, and one stopped run."""
    for seed, value in ((0, 50.0), (1, 70.0)):
        saved("esc@base", seed, value, wall_seconds=60.0 * (seed + 1))
    config = {"seed_everything": 0, "model": {"init_args": {"rate": 0.3}, "class_path": "a.B"}, "data": {"root": "/d"}}
    tried = saved("base+1f2e3d", 0, 40.0, config=config, job="pretrain")
    (tried / "identity.json").write_text(json.dumps({"arguments": ["--model.rate", "0.3"], "lineage_hash": "0" * 12}))
    (tried / "metrics.csv").write_text("step,name,value\n0,train/loss,3\n5,train/loss,1\n9,train/loss,2\n")
    stopped = project / "runs" / "mct" / "mini" / "seed2" / "base"
    stopped.mkdir(parents=True)
    (stopped / "identity.json").write_text(json.dumps({"arguments": [], "lineage_hash": "0" * 12}))
    (stopped / "config.yaml").write_text(yaml.safe_dump({"model": {"rate": 0.7}, "out": str(stopped / "media")}))
    (stopped.parent / "base.previous-20260101-120000").mkdir()
    (stopped.parent / "base.previous-20260101-120000" / "identity.json").write_text("{}")
    return project / "runs"


def run(capsys: Capsys, folder: Path, *arguments: str) -> str:
    assert main(["runs", *arguments, "--runs", str(folder)]) == 0
    return capsys.readouterr().out


def test_finished_and_stopped_runs_are_found(folder: Path) -> None:
    found = find_runs(folder)
    assert [(r.name, r.state) for r in found] == [
        ("mct/mini/seed0/base+1f2e3d", DONE),
        ("mct/mini/seed0/esc@base", DONE),
        ("mct/mini/seed1/esc@base", DONE),
        ("mct/mini/seed2/base", STOPPED),
    ]
    assert found[3].config["model.rate"] == 0.7
    assert find_runs(folder, ["other"]) == []


def test_a_run_that_is_held_or_tells_its_progress_is_running(folder: Path) -> None:
    stopped = folder / "mct" / "mini" / "seed2" / "base"
    with (stopped.parent / ".base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert find_runs(folder)[-1].state == RUNNING
    assert find_runs(folder)[-1].state == STOPPED
    (stopped / "progress.json").write_text(json.dumps({"step": 30, "share": 0.25, "loss": 1.5, "left": 75.0}))
    found = find_runs(folder)[-1]
    assert found.state == RUNNING


def test_json_has_configuration_metrics_and_curves(folder: Path, capsys: Capsys) -> None:
    tried, *_, stopped = json.loads(run(capsys, folder, "--json"))
    assert tried["config"]["model.rate"] == 0.3
    assert tried["metrics"]["test/top1"] == 40.0
    assert tried["curves"] == {"train/loss": 2.0, "train/loss:min": 1.0, "train/loss:max": 3.0}
    assert stopped["state"] == "stopped"


def test_what_is_wrong_is_named(folder: Path, capsys: Capsys) -> None:
    for arguments, told in (
        (("--diff", "esc@base", "base"), "means several runs"),
        (("--diff", "seed0/esc@bas", "base"), "did you mean 'mct/mini/seed0/esc@base'"),
        (("--diff", "esc@base", "base", "--json"), "leave out --json"),
    ):
        assert main(["runs", *arguments, "--runs", str(folder)]) == 2
        assert re.search(told.replace("+", r"\+"), capsys.readouterr().err)
    assert main(["runs", "--runs", str(folder / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_smallest_value_is_of_all_points_and_not_of_the_thinned_ones(tmp_path: Path) -> None:
    rows = [f"{step},loss,{0 if step == 333 else 5}" for step in range(1000)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,name,value", *rows, "0,once,7"]) + "\n")
    assert summaries(tmp_path / "metrics.csv") == {"loss": 5.0, "loss:min": 0.0, "loss:max": 5.0, "once": 7.0}
