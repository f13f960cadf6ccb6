"""The sweep files of W&B, and its agent against a server of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from common.reporting.papers import project_root
from common.reporting.results import find_promoted
from common.stages.configuration import check_ranges, take_switches
from common.stages.request import Selection, find_request
from tests.wandb_stub import KEY, WandbStub, forget, serving


@pytest.mark.parametrize("path", sorted((project_root() / "configs" / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_sweeps_for_wandb_name_fields_and_metrics_that_exist(path: Path) -> None:
    paper, sweep = path.stem, yaml.safe_load(path.read_text(encoding="utf-8"))
    program, command, name, *options, last = sweep["command"]
    assert (program, command, last) == (".venv/bin/assemble", "fit", "${args}")
    fields = {field: spec["values"] for field, spec in sweep["parameters"].items() if field != "seed"}
    request = None
    for field, values in fields.items():
        for value in values:
            request = find_request(name, Selection(scale=options[1]), [f"--{field}={value}"])
            run = request.configuration
            check_ranges(take_switches(run.config)[1], run.layers)
    assert request is not None
    assert request.paper == paper
    stage = request.stage.partition("+")[0]
    measured = [record for record in find_promoted(paper, "mini") if record.stage == stage]
    assert measured
    assert all(sweep["metric"]["name"] in record.metrics for record in measured)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    """A server, and an environment whose key is for it; not WANDB_MODE, which an agent's user does not set either."""
    with serving() as found:
        for name in (
            "NETRC",
            "WANDB_CONFIG_DIR",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "http_proxy",
            "https_proxy",
            "WANDB_MODE",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("WANDB_SILENT", raising=False)  # the client says what its user types next
        for name, value in {"WANDB_BASE_URL": found.address, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        forget()
        yield found
        assert not found.unknown
    forget()


def test_the_agent_of_wandb_runs_a_sweep(stub: WandbStub, tmp_path: Path) -> None:
    """The shipped file, at smoke and with fewer values; an agent's runs log online, though nobody said WANDB_MODE."""
    sweep = yaml.safe_load((project_root() / "configs" / "sweeps" / "avid_cma.yaml").read_text(encoding="utf-8"))
    program = [sys.executable, "-m", "common.commands.main", "fit", "avid/avid", "--scale", "smoke"]
    sweep["command"] = [*program, "--runs", str(tmp_path / "runs"), "${args}"]
    sweep["parameters"] = {"model.loss.temperature": {"values": [0.05]}, "seed": {"values": [1]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(project_root())}

    def wandb(*arguments: str) -> str:
        command = [sys.executable, "-m", "wandb", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "wandb agent someone/mine/grid" in wandb("sweep", "--project", "mine", "sweep.yaml")
    wandb("agent", "someone/mine/grid")
    assert set(stub.runs) == {"trial0"}
    run = stub.runs["trial0"]
    assert run.fields["sweep"] == "grid"
    assert run.exit_code == 0
    assert run.config["model.loss.temperature"] == 0.05
    assert run.config["model"]["init_args"]["loss"]["init_args"]["temperature"] == 0.05
    assert run.config["seed"] == 1
    assert "test/loss_last" in run.summary
