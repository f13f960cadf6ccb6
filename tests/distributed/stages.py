"""Run a stage in one process, or in two processes started as by a launcher."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from assemble.stages.request import StageRequest
from assemble.stages.run import run_stage
from tests.distributed.harness import run_distributed


def over(layer: dict[str, Any], devices: int) -> dict[str, Any]:
    """Return a YAML layer with a trainer for this many devices."""
    strategy = "ddp" if devices > 1 else "auto"
    return {**layer, "trainer": {**layer["trainer"], "devices": devices, "strategy": strategy}}


def train(stage: StageRequest) -> dict[str, Any]:
    """Run a stage. Return its final `state`, and `metrics`, `data` and `steps` of its record."""
    record = run_stage(stage)
    state = torch.load(stage.directory / "checkpoints" / "last.ckpt", weights_only=True)
    return {"state": state["state_dict"], "metrics": record.metrics, "data": record.data, "steps": record.steps}


def train_on_two(stage: StageRequest) -> list[dict[str, Any]]:
    """Run a stage in two processes. Return `train`'s result for each rank, but with that rank's own final `state`."""
    return run_distributed(_train_rank, 2, stage)


def _train_rank(rank: int, stage: StageRequest) -> dict[str, Any]:
    """Run one rank, with torchrun's environment variables."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    own: dict[str, Any] = {}
    fit = pl.Trainer.fit

    def fit_and_look(trainer: pl.Trainer, model: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        fit(trainer, model, *args, **kwargs)
        own.update(copy.deepcopy(model.state_dict()))

    # The checkpoint only has the state of rank 0. The patch is harmless, since this process is a fork.
    pl.Trainer.fit = fit_and_look  # type: ignore[method-assign]
    return {**train(stage), "state": own}


def require_equal(
    found: dict[str, Any], expected: dict[str, Any], rtol: float, atol: float, without: Collection[str] = ()
) -> None:
    """Check that a module's state is equal within tolerances, except for the names in `without`."""
    for name, value in expected.items():
        if name in without:
            continue
        if isinstance(value, torch.Tensor):
            other = torch.as_tensor(found[name])
            assert other.dtype == value.dtype, name
            torch.testing.assert_close(other, value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert found[name] == value, name


def require_close(found: dict[str, Any], expected: dict[str, Any], without: Collection[str] = ()) -> None:
    """Check that metrics are equal up to rounding, except for the names in `without`."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name not in without:
            assert found[name] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-3)), name
