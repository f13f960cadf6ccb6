"""Test W&B's real client with a local server: login, a stage online, resuming, and a later sync."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from unittest.mock import Mock
from urllib.error import HTTPError

import pytest
import wandb
import yaml

from assemble.reporting import wandb_server
from assemble.reporting.papers import project_root
from assemble.reporting.results import find_promoted
from assemble.reporting.wandb_server import NO_KEY, server, why_no_key, why_unreachable
from assemble.stages.configuration import check_arguments
from assemble.stages.loggers import StageWandbLogger, own_id, wandb_logger, wandb_mode
from assemble.stages.request import Selection, find_request
from assemble.stages.run import run_stage
from tests.machine import LONG
from tests.stages import request
from tests.wandb_stub import KEY, WandbStub, forget, serving


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a home folder without a W&B key, and drop the client's cached settings."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("API_KEY", "BASE_URL", "IDENTITY_TOKEN_FILE", "CONFIG_DIR", "SILENT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("WANDB_MODE", "online")
    # A stage that continues offline sets this variable for the whole process. The next test must not inherit it.
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # Allow a slow machine more time, so that the network doesn't count as missing.
    monkeypatch.setattr(wandb_server, "PATIENCE_SECONDS", LONG)
    patient = {"init_timeout": LONG, "finish_timeout": LONG}
    monkeypatch.setattr(wandb, "Settings", lambda own=wandb.Settings, **given: own(**given | patient))
    forget()
    yield folder
    forget()


@pytest.fixture
def stub() -> Iterator[WandbStub]:
    with serving() as found:
        yield found
        assert not found.unknown


@pytest.fixture
def keyed(stub: WandbStub, monkeypatch: pytest.MonkeyPatch) -> WandbStub:
    """Start the server, and set its key in the environment."""
    monkeypatch.setenv("WANDB_BASE_URL", stub.address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return stub


def client(*arguments: str, **environment: str) -> None:
    """Run `wandb` as a user types it."""
    command = [sys.executable, "-m", "wandb", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stdout + done.stderr


def sync(stub: WandbStub, *arguments: str) -> None:
    client("sync", *arguments, WANDB_BASE_URL=stub.address, WANDB_API_KEY=KEY, WANDB_MODE="online")


def begin(folder: Path, run_id: str = "one", whole: bool = False) -> StageWandbLogger:
    logger = wandb_logger(folder, whole, id=run_id, name="one", group="g", job_type="pretrain", tags=[], config={})
    assert logger is not None
    return logger


def test_a_login_with_a_host_is_found(stub: WandbStub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client("login", "--host", stub.address, KEY)
    assert server() == stub.address
    assert why_no_key() == ""
    assert why_unreachable() == ""
    assert wandb_mode() == "online"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SWEEP_ID", "of an agent")
    assert wandb_mode() == "online"


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("WANDB_BASE_URL", "127.0.0.1:8080", "base_url"),
        ("WANDB_API_KEY", "", NO_KEY),
        ("WANDB_API_KEY", "short", "40+ characters"),
    ],
)
def test_a_setting_that_cannot_be_right_is_told_in_one_line(
    variable: str, value: str, told: str, keyed: WandbStub, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    assert told in why_no_key()
    assert told in why_unreachable()
    capsys.readouterr()
    assert wandb_mode() == "offline"
    out = capsys.readouterr().out
    assert told in out
    assert out.count("\n") == 1


def test_a_server_that_hangs_or_is_behind_a_broken_proxy_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_server, "PATIENCE_SECONDS", 0.5)
    with socket.socket() as deaf, socket.create_server(("127.0.0.1", 0)) as silent:
        deaf.bind(("127.0.0.1", 0))  # has a port but doesn't listen
        for one in (deaf, silent):
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{one.getsockname()[1]}")
            clock = time.monotonic()
            assert "does not answer" in why_unreachable()
            assert time.monotonic() - clock < 80  # the client would retry for 90 seconds
    for code in (404, 502, 503, 504):
        opener = Mock(**{"return_value.open.side_effect": HTTPError("", code, "no", Message(), None)})
        monkeypatch.setattr(wandb_server, "build_opener", opener)
        assert ("does not answer" in why_unreachable()) is (code != 404), code
        opener.return_value.open.assert_called_once_with(server(), timeout=0.5)


def test_stages_online(
    keyed: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = keyed
    for name, value in {"PROJECT": "mine", "TAGS": "tried, twice", "RUN_GROUP": "together"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    first = run_stage(request("avid/avid", tmp_path))
    second = run_stage(request("avid/kinetics_linear@avid", tmp_path))
    run = stub.runs[str(first.wandb_run_id)]
    assert f"{stub.address}/someone/mine/runs/{first.wandb_run_id}" in capsys.readouterr().err
    assert run.fields["project"] == "mine"
    assert run.fields["groupName"] == "together"
    assert {"smoke", "tried", "twice"} <= set(run.fields["tags"])
    assert run.exit_code == 0
    wanted = {"paper": "avid_cma", "scale": "smoke", "seed": 0, "recipe": first.recipe, "row": "avid"}
    wanted |= {"config_hash": first.config_hash, "lineage_hash": first.lineage_hash, "hardware": "cpu"}
    assert {key: run.config[key] for key in wanted} == wanted
    assert run.config["revision"]
    checkpoint = stub.artifact(f"{first.wandb_run_id}-last")
    # Make a third run, with an override, that logs every step.
    third = run_stage(request("avid/avid", tmp_path, "--trainer.log_every_n_steps", "1"))
    curves = stub.runs[str(third.wandb_run_id)]
    assert curves.fields["displayName"] == "avid-smoke-s0 log_every_n_steps=1"
    for key in ("train/loss", "learning_rate", "gradient_norm", "speed/samples_per_second", "memory/process_gib"):
        rows = [row for row in curves.history if key in row]
        assert rows, key
        assert all("trainer/global_step" in row for row in rows), key
        assert max(row["trainer/global_step"] for row in rows) == third.steps - 1
    assert all(0 <= row["speed/data_waiting_share"] <= 1 for row in curves.history if "speed/data_waiting_share" in row)
    assert run.summary["test/loss_first"] == first.metrics["test/loss_first"]
    losses = [row["train/loss"] for row in curves.history if "train/loss" in row]
    assert len(losses) > 1
    assert curves.summary["min/train/loss"] == pytest.approx(min(losses))
    assert curves.summary["max/train/loss"] == pytest.approx(max(losses))
    assert curves.summary["train/loss"] == losses[-1]
    # In W&B's graph, the child uses the parent's checkpoint, which is listed but not uploaded.
    probe = stub.runs[str(second.wandb_run_id)]
    assert checkpoint.kind == "checkpoint"
    assert checkpoint.metadata["lineage_hash"] == first.lineage_hash
    assert probe.used == [checkpoint.name]
    (entry,) = checkpoint.manifest["contents"].values()
    assert entry["ref"].startswith("file://")
    assert not checkpoint.uploaded
    assert "table/kinetics_linear/best" in probe.summary


def test_an_offline_run_is_synced_with_its_lineage(
    stub: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    stages = [request("avid/avid", tmp_path), request("avid/kinetics_linear@avid", tmp_path)]
    first, second = (run_stage(stage) for stage in stages)
    for stage in stages:
        sync(stub, *map(str, stage.directory.glob("wandb/offline-run-*")))
    run, probe = stub.runs[str(first.wandb_run_id)], stub.runs[str(second.wandb_run_id)]
    assert run.fields["displayName"] == "avid-smoke-s0"
    assert run.summary["test/loss_first"] == first.metrics["test/loss_first"]
    assert probe.used == [f"{first.wandb_run_id}-last"]
    assert probe.fields["project"] == "representation-assemble"
    assert probe.fields["groupName"] == f"avid_cma/smoke/kinetics_linear@avid-{second.configuration[:8]}"
    assert probe.fields["jobType"] == "probe"
    assert {"smoke", "avid"} <= set(probe.fields["tags"])
    assert (probe.config["stage"], probe.config["row"]) == ("kinetics_linear@avid", "avid")
    assert probe.config["data"]["init_args"]["video"]["crop"] == 24
    logged = {key for row in run.history for key in row} | set(run.summary)
    assert any(key.startswith("neighbors_table") for key in logged)
    assert any(key.startswith("neighbors") and "table" not in key for key in logged)


def test_a_run_that_cannot_start_online_starts_offline(
    keyed: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("assemble.stages.loggers.why_unreachable", lambda: "")
    keyed.refusing = 401
    logger = begin(tmp_path)
    out = capsys.readouterr().out
    assert "could not start online" in out
    assert out.count("\n") == 1
    logger.log_metrics({"train/loss": 1.0}, step=0)
    logger.finish(exit_code=0)
    assert capsys.readouterr().out == ""
    keyed.refusing = 200
    sync(keyed, *map(str, tmp_path.glob("wandb/offline-run-*")))
    assert [row["train/loss"] for row in keyed.runs["one"].history] == [1]


def test_folders_have_ids_of_their_own_and_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    mine, theirs = own_id(tmp_path / "mine", "one"), own_id(tmp_path / "theirs", "one")
    assert mine != theirs
    begin(tmp_path / "mine", mine).finish(exit_code=0)
    assert own_id(tmp_path / "mine", "one") == mine
    assert own_id(tmp_path / "mine", "two") != mine  # another configuration in this folder


def test_an_offline_run_that_was_resumed_counts_on(
    stub: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in ((0, 1, 2), (2, 3)):
        logger = begin(tmp_path)
        for step in steps:
            logger.log_metrics({"train/loss": float(step)}, step=step)
        logger.finish(exit_code=0)
        time.sleep(1.1)  # the client names folders by the second and sends them in order
    sync(stub, *map(str, tmp_path.glob("wandb/offline-run-*")))
    rows = stub.runs["one"].history
    assert [row["trainer/global_step"] for row in rows] == [0, 1, 2, 2, 3]
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})


def test_a_client_that_dies_ends_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the client dies, all calls fail, as if its process was killed."""
    import wandb

    def lost(*_: object, **__: object) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("log", "_log_artifact", "finish"):
        monkeypatch.setattr(wandb.Run, name, lost)
    monkeypatch.setattr(wandb.Image, "__init__", lost)  # pictures are files as well
    monkeypatch.setattr(wandb.Table, "__init__", lost)
    record = run_stage(request("avid/avid", tmp_path, "--trainer.log_every_n_steps", "1"))
    assert record.metrics["test/loss_last"] is not None
    assert record.media
    out = capsys.readouterr().out
    assert out.count("W&B: ") == 1
    assert "ConnectionResetError: Connection lost; the stage continues" in out


def test_a_logger_of_the_user_stands_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "mine")}}
    stage = request("avid/avid", tmp_path, "--trainer.logger", json.dumps(logger), "--trainer.log_every_n_steps", "1")
    record = run_stage(stage)
    assert request("avid/avid", tmp_path, "--trainer.logger", json.dumps(logger)).stage == "avid"
    assert record.lineage_hash == request("avid/avid", tmp_path).lineage
    (path,) = (tmp_path / "mine").rglob("metrics.csv")
    assert "train/loss" in path.read_text(encoding="utf-8")
    assert (stage.directory / "metrics.csv").is_file()
    assert list(stage.directory.glob("wandb/offline-run-*"))


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_the_sweep_for_wandb_names_fields_and_metrics_that_exist() -> None:
    (path,) = (project_root() / "configs" / "sweeps").glob("*.yaml")
    paper, sweep = path.stem, yaml.safe_load(path.read_text(encoding="utf-8"))
    program, command, name, *options, last = sweep["command"]
    assert (program, command, last) == (".venv/bin/assemble", "fit", "${args}")
    fields = {field: spec["values"] for field, spec in sweep["parameters"].items() if field != "seed"}
    request = None
    for field, values in fields.items():
        for value in values:
            request = find_request(name, Selection(scale=options[1]), [f"--{field}={value}"])
            run = request.configuration
            check_arguments(run.with_placeholders(DATA="data"), run.layers)
    assert request is not None
    assert request.paper == paper
    stage = request.stage.partition("+")[0]
    measured = [record for record in find_promoted(paper, "mini") if record.stage == stage]
    assert measured
    assert all(sweep["metric"]["name"] in record.metrics for record in measured)
