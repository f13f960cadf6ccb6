"""Sweeps: without an account by our own scheduler, and by the agent of W&B against a server of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from common.commands.main import main
from common.errors import StageError
from common.reporting import records
from common.reporting.papers import project_root
from common.reporting.records import Record, find_promoted
from common.stages import run as running
from common.stages.configuration import check_arguments, take_switches
from common.stages.plan import Selection, fit_arguments
from common.stages.run import StageRequest
from common.stages.single import find_request
from common.stages.sweep import combinations, plan_sweep
from tests.wandb_stub import KEY, WandbStub, forget, serving


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages end at once, with a loss that is their temperature and their seed; names of those that ran."""
    names: list[str] = []

    def run_stage(request: StageRequest, unless_done: bool = False) -> Record:
        names.append(f"{request.stage} {request.seed}")
        config = request.configuration().config
        temperature = config["model"]["init_args"]["loss"]["init_args"]["temperature"]
        if temperature == 9:
            raise StageError("it diverged")
        record = Record(
            paper=request.paper, stage=request.stage, recipe=request.recipe, job=request.job, row=request.row,
            scale=request.scale, seed=request.seed, config=config, config_hash=records.config_hash(config),
            lineage_hash=request.lineage_hash(), git={"revision": None, "dirty": None},
            started=datetime.now(UTC).isoformat(),
            metrics={"test/loss_last": temperature + request.seed, "test/n": 1.0},
        )  # fmt: skip
        records.write(request.directory / "record.json", record)
        return record

    monkeypatch.setattr(running, "run_stage", run_stage)
    return names


def sweep(capsys: pytest.CaptureFixture[str], runs: Path, *arguments: str, status: int = 0) -> str:
    given = ["sweep", "avid/avid", *arguments, "--scale", "smoke", "--runs", str(runs), "--jobs", "1"]
    assert main(given) == status
    captured = capsys.readouterr()
    return captured.out + captured.err


def rows(output: str) -> list[list[str]]:
    """Cells of the table's lines, without its head."""
    lines = output[output.index("temperature  ") :].splitlines()[1:]
    return [line.split() for line in lines if " of " in line]


def test_a_sweep_runs_goes_on_and_ends_in_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ran: list[str]
) -> None:
    output = sweep(capsys, tmp_path, "--model.loss.temperature", "0.3", "0.1", "--seeds", "0", "1")
    assert len(ran) == 4
    assert [row[0] for row in rows(output)] == ["0.1", "0.3"]
    assert rows(output)[0][1:4] == ["0.6", "±", "0.71"]
    assert "sorted by test/loss_last, smallest first" in output
    # One more value: what is done is not done again, and is the same as a fit with the same override.
    output = sweep(capsys, tmp_path, "--model.loss.temperature", "0.3", "0.1", "0.2", "--seeds", "0", "1", "--largest")
    assert len(ran) == 6
    assert [row[0] for row in rows(output)] == ["0.3", "0.2", "0.1"]
    again, fit = (
        find_request("avid/avid", Selection(scale="smoke", runs=tmp_path), words)
        for words in (["--model.loss.temperature", "0.2"], ["--model.loss.temperature=0.2"])
    )
    assert fit.directory == again.directory
    assert ran[4] == f"{fit.stage} 0"
    # Another process is told the stage by its name and its overrides.
    assert fit_arguments(fit)[1] == "avid_cma/avid"
    assert fit_arguments(fit)[-1] == "--model.loss.temperature=0.2"
    output = sweep(capsys, tmp_path, "--model.loss.temperature", "0.3", "0.1", "--sort", "test/n")
    assert len(ran) == 6
    assert "sorted by test/n" in output


def test_values_stand_in_the_table_as_they_were_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ran: list[str]
) -> None:
    output = sweep(capsys, tmp_path, "--data.dataset.root", "'[dog]'", "'[/a/b]'")
    table = output[output.index("root  ") :]
    assert "[dog]" in table
    assert "[/a/b]" in table


def test_a_trial_that_fails_costs_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str], ran: list[str]) -> None:
    output = sweep(capsys, tmp_path, "--model.loss.temperature", "9", "0.1", status=1)
    assert "it diverged" in output
    assert [row[0] for row in rows(output)] == ["0.1", "9"]
    assert rows(output)[1][1] == "-"
    assert len(ran) == 2
    assert "no table to show" in sweep(capsys, tmp_path, "--model.loss.temperature", "9", status=1)


def test_parents_run_first_and_once(tmp_path: Path) -> None:
    selection = Selection(scale="smoke", runs=tmp_path, seeds=(0, 1))
    planned, trials = plan_sweep("avid/esc@avid", selection, ["--data.batch_size", "8", "16"])
    assert len(trials) == 2
    order = [(item.request.stage.partition("+")[0], item.request.seed) for item in planned]
    assert order[:2] == [("avid", 0), ("avid", 1)]
    assert sorted(order[2:]) == [("esc@avid", 0), ("esc@avid", 0), ("esc@avid", 1), ("esc@avid", 1)]


def test_combinations_are_all_of_them() -> None:
    assert combinations(["--a", "1", "2", "--b=x", "--c", "-1", "[1, 2]", "-1"]) == [
        (("a", a), ("b", "x"), ("c", c)) for a in ("1", "2") for c in ("-1", "[1, 2]")
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name at least one field"),
        (["--a"], "--a needs values"),
        (["0.1", "--a", "1"], "unexpected '0.1'"),
        (["--a", "1", "--a", "2"], "given twice"),
    ],
)
def test_what_is_no_sweep_is_told(arguments: list[str], told: str) -> None:
    with pytest.raises(StageError, match=told):
        combinations(arguments)


def test_a_wrong_field_or_value_stops_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ran: list[str]
) -> None:
    assert "temperature" in sweep(capsys, tmp_path, "--model.loss.temprature", "0.1", status=2)
    assert "temperature" in sweep(capsys, tmp_path, "--model.loss.temperature", "0.1", "-1", status=2)
    assert "did you mean 'test/loss_last'" in sweep(
        capsys, tmp_path, "--model.loss.temperature", "0.1", "--sort", "test/los_last", status=2
    )
    assert len(ran) == 1


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
            run = request.configuration()
            check_arguments(take_switches(run.config)[1], run.layers)
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
