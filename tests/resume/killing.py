"""Kill a stage within a step, or resume from the state at that moment, and compare with an uninterrupted run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from assemble.reporting.records import Record
from assemble.stages.request import StageRequest
from assemble.stages.run import run_stage
from tests.machine import LONG
from tests.stages import callbacks

LAYER = {"trainer": {"max_epochs": 3, "limit_train_batches": 1.0, "log_every_n_steps": 1, "callbacks": callbacks(4)}}


def _run_until_killed(stage: StageRequest, module: Any, step: int) -> None:
    original = module.training_step

    def watched(self: Any, *args: Any) -> Any:
        if self.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    module.training_step = watched
    run_stage(stage)


def kill_at(stage: StageRequest, module: type, step: int) -> None:
    """Run a stage, and kill it in the middle of a step."""
    process = multiprocessing.get_context("fork").Process(target=_run_until_killed, args=(stage, module, step))
    process.start()
    process.join(LONG)
    assert process.exitcode == -signal.SIGKILL


def run_and_resume(
    stage: StageRequest, owner: type, method: str, when: Callable[..., bool]
) -> tuple[list[Record], Path]:
    """Run a stage, copy its folder when `when` is true, and resume from the copy. Both runs must have the same results.

    Returns:
        Both records, and the new path of the first run's folder.
    """
    folder = stage.directory
    whole, begun = folder.with_name("whole"), folder.with_name("begun")
    original = getattr(owner, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if not begun.exists() and when(*args, **kwargs):
            shutil.copytree(folder, begun)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, watched)
        records = [run_stage(stage)]
    assert (begun / "checkpoints" / "last.ckpt").exists()
    assert not (begun / "record.json").exists()
    folder.rename(whole)
    begun.rename(folder)
    records.append(run_stage(stage))
    compare(whole, folder)
    assert records[0].metrics == records[1].metrics
    assert records[0].steps == records[1].steps
    return records, whole


def assert_resumes(stage: StageRequest, module: type, step: int) -> Record:
    """Run a stage, copy its folder in the middle of a step, and resume from the copy. The results must be equal."""
    return run_and_resume(stage, module, "training_step", lambda self, *_: self.trainer.global_step == step)[0][1]


def assert_equal(left: Any, right: Any, where: str = "checkpoint") -> None:
    """Check that values have equal types, shapes and bits at every level."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for position, (a, b) in enumerate(zip(left, right)):
            assert_equal(a, b, f"{where}.{position}")
    else:
        assert left == right, where


def compare(whole: Path, resumed: Path) -> None:
    """Check that the folders of two runs have the same weights, optimizers and curves."""
    states = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, resumed)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_equal(states[0][key], states[1][key], key)
    logged = [(folder / "metrics.csv").read_text(encoding="utf-8") for folder in (whole, resumed)]
    assert logged[0] == logged[1]
    assert "train/loss" in logged[0]
