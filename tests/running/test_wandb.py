"""What a stage leaves on W&B, read back from the offline file; and that W&B can neither stop nor delay a run."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from common.errors import StageError
from common.stages.loggers import MetricsFile, wandb_mode
from common.stages.run import _wandb_of, run_stage
from common.stages.telemetry import Telemetry
from common.training.callbacks import WholeCheckpoints
from tests.stages import read_metrics, request


@pytest.mark.parametrize(("mode", "expected"), [("", "offline"), ("offline", "offline"), ("disabled", "disabled")])
def test_mode_without_a_network(monkeypatch: pytest.MonkeyPatch, mode: str, expected: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("looked for a server although nobody asked for it")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_mode() == expected


def test_a_run_is_named_and_tagged_by_its_stage_and_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = []
    monkeypatch.setattr("common.stages.loggers.wandb_logger", lambda **options: runs.append(options))
    for name in ("avid/avid", "avid/kinetics_linear@avid"):
        _wandb_of(request(name, tmp_path), {}, {"revision": "0123456789abcdef"})
    assert [(run["name"], run["tags"], run["job_type"], run["config"]["row"]) for run in runs] == [
        ("avid-smoke-s0", ["smoke", "0123456789ab"], "pretrain", "avid"),
        ("kinetics_linear@avid-smoke-s0", ["smoke", "avid", "0123456789ab"], "probe", "avid"),
    ]


def test_a_key_without_a_network_falls_back_within_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.socket() as deaf:  # it has a port and does not listen
        deaf.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        clock = time.monotonic()
        assert wandb_mode() == "offline"
        assert time.monotonic() - clock < 80  # the client itself asks again for 90 seconds
    assert run_stage(request("avid/avid", tmp_path)).metrics["test/retrieval_chance"] is not None


def test_the_metrics_file_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    for step in range(5):
        logger.log_metrics({"a": step / 3, "b": 1.0}, step)
    whole = path.read_text(encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write("7,a,0.1\n8,b")  # a row that a kill cut off
    logger.drop_after(4)
    assert path.read_text(encoding="utf-8") == whole
    # A test stands under the last step, and is made again.
    logger.log_metrics({"test/top1": 1.0}, 4)
    logger.drop_after(4)
    assert path.read_text(encoding="utf-8") == whole
    logger.drop_after(2)
    assert read_metrics(path) == {"a": [(0, 0.0), (1, 1 / 3), (2, 2 / 3)], "b": [(0, 1.0), (1, 1.0), (2, 1.0)]}


def test_a_disk_that_was_full_for_a_while_costs_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, full = tmp_path / "metrics.csv", False
    fsync = os.fsync

    def sometimes(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sometimes)
    logger = MetricsFile(path)
    for step in range(6):
        full = step in (0, 2, 3)
        logger.log_metrics({"a": float(step)}, step)
        if full:
            assert "\n3," not in path.read_text(encoding="utf-8")
    assert read_metrics(path) == {"a": [(step, float(step)) for step in range(6)]}
    assert path.read_text(encoding="utf-8").count("step,name,value") == 1
    out = capsys.readouterr().out
    assert out.count("No space left on device") == 2  # once each time
    assert "free space" in out


def test_no_checkpoint_is_written_before_the_values_that_lead_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, fsync = errno.ENOSPC, os.fsync

    def fails(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    logger = MetricsFile(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 1.0}, 0)
    with pytest.raises(StageError, match=r"could not write .*metrics.csv: No space left on device"):
        WholeCheckpoints("Net", logger.flush).save_checkpoint({}, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()
    code = errno.EINVAL  # of a file system that has no fsync
    logger.flush()
    assert read_metrics(tmp_path / "metrics.csv") == {"a": [(0, 1.0)]}
    monkeypatch.setattr(os, "fsync", fsync)
    WholeCheckpoints("Net", logger.flush).save_checkpoint({}, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").exists()


def test_what_is_logged_of_a_step_is_of_this_step(tmp_path: Path) -> None:
    """Two batches make a step, and the schedule moves on at its end."""

    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return (self.weight * batch).mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    trainer = pl.Trainer(
        max_steps=3, accumulate_grad_batches=2, log_every_n_steps=1, logger=MetricsFile(tmp_path / "metrics.csv"),
        callbacks=[Telemetry()], accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(12, 1), batch_size=2))
    found = read_metrics(tmp_path / "metrics.csv")
    assert found["learning_rate"] == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert found["gradient_norm"] == [(step, 1.0) for step in range(3)]
