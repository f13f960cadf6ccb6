"""Test what a stage sends to W&B, read back from the offline file. W&B must neither stop nor delay a run."""

from __future__ import annotations

import errno
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from assemble.reporting.wandb_server import check_environment
from assemble.stages import loggers, telemetry
from assemble.stages.loggers import MetricsFile, wandb_mode
from assemble.stages.telemetry import Telemetry
from common.errors import ReportingError, StageError
from tests.stages import read_metrics


@pytest.mark.parametrize(("mode", "expected"), [("", "offline"), ("offline", "offline"), ("disabled", "disabled")])
def test_mode_without_a_network(monkeypatch: pytest.MonkeyPatch, mode: str, expected: str) -> None:
    monkeypatch.delattr(socket, "create_connection")  # must not ask a server
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_mode() == expected


def test_what_the_client_would_stumble_over_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "")
    monkeypatch.setenv("WANDB_MODE", "Online")
    check_environment()
    assert "WANDB_SILENT" not in os.environ
    for name, value, told in (
        ("WANDB_SILENT", "yess", "WANDB_SILENT=yess: valid: 0, 1"),
        ("WANDB_MODE", "onlne", "WANDB_MODE=onlne: did you mean 'online'?"),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(ReportingError, match=re.escape(told)):
            check_environment()
        monkeypatch.delenv(name)


def test_a_folder_whose_name_is_not_text_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Name the folder as under a C locale, where a letter with an accent can't be decoded."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert loggers.wandb_logger(tmp_path / "\udcc3", id="one", tags=[], group="stage") is None
    printed = capfd.readouterr()
    assert "could not start offline (StageError: the folder's name isn't UTF-8" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(("whole", "system", "load"), [(False, "0", False), (True, "", True), (False, "1", True)])
def test_machine_load_is_logged_at_paper_scale_or_on_request(
    whole: bool, system: str, load: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("ASSEMBLE_WANDB_SYSTEM", system)
    start = Mock(return_value=Mock(id="one"))
    monkeypatch.setattr("wandb.init", start)
    assert loggers.wandb_logger(tmp_path, whole, id="one", tags=[], group="stage") is not None
    settings = start.call_args.kwargs["settings"]
    hidden = (settings.x_disable_stats, settings.x_disable_meta, settings.disable_git, settings.console == "off")
    assert {*hidden} == {not load}


def test_the_metrics_file_forgets_what_came_after_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    for step in range(5):
        logger.log_metrics({"a": step / 3, "b": 1.0}, step)
    whole = path.read_text(encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write("7,a,0.1\n8,b")  # a kill cut off this row
    logger.drop_after(4)
    assert path.read_text(encoding="utf-8") == whole
    # A test is logged at the last step, and runs again after a full disk.
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.csv"):
        logger.log_metrics({"test/top1": 1.0}, 4)
    monkeypatch.undo()
    logger.drop_after(4)
    assert path.read_text(encoding="utf-8") == whole
    logger.drop_after(2)
    assert read_metrics(path) == {"a": [(0, 0.0), (1, 1 / 3), (2, 2 / 3)], "b": [(0, 1.0), (1, 1.0), (2, 1.0)]}
    path.write_bytes(b"\xff")
    with pytest.raises(StageError, match="csv: "):
        logger.drop_after(2)


def test_what_is_logged_of_a_step_is_of_this_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with two batches per step and a new rate after each step. A batch takes 1 s to load and 3 s to compute."""
    now, told = 0.0, []

    class Slow(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, place: int) -> torch.Tensor:
            nonlocal now
            now += 0.5
            return torch.ones(1)

    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            nonlocal now
            now += 3.0
            return (self.weight * batch).mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    class Machine(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            told.append((step, metrics))

    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(telemetry, "peak_memory_gib", lambda: 1.5)
    trainer = pl.Trainer(
        max_steps=3, accumulate_grad_batches=2, log_every_n_steps=1, accelerator="cpu", callbacks=[Telemetry()],
        logger=[MetricsFile(tmp_path / "metrics.csv"), Machine(tmp_path)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data: Any = pl.LightningDataModule.from_datasets(Slow(), batch_size=2)
    data.batch_size = 2
    trainer.fit(Line(), datamodule=data)
    found = read_metrics(tmp_path / "metrics.csv")
    assert found == {"learning_rate": [(0, 1.0), (1, 0.5), (2, 0.25)], "gradient_norm": [(n, 1.0) for n in range(3)]}
    machine = {"speed/data_waiting_share": 0.25, "speed/samples_per_second": 0.5, "memory/process_gib": 1.5}
    own = [{name: values[step][1] for name, values in found.items()} for step in range(3)]
    assert told == [(step, {**own[step], **machine}) for step in range(3)]
    # On a GPU, telemetry logs the GPU's memory.
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 29)
    gpu: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    assert Telemetry()._of_machine(gpu)["memory/gpu_gib"] == 1.5
