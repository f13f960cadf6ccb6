"""Killing a stage in the middle of a step, and comparing what it wrote with what another one wrote."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.reporting.records import Record
from common.stages.request import StageRequest
from common.stages.run import run_stage
from tests.stages import callbacks

LAYER = {"trainer": {"max_epochs": 3, "limit_train_batches": 1.0, "log_every_n_steps": 1, "callbacks": callbacks(4)}}


def _run_until_killed(stage: StageRequest, owner: type, method: str, when: Callable[..., bool]) -> None:
    original = getattr(owner, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, method, watched)
    os.environ["WANDB_MODE"] = "disabled"  # a forked child must not talk to its parent's W&B service
    run_stage(stage)


def kill_when(stage: StageRequest, owner: type, method: str, when: Callable[..., bool]) -> None:
    """Run a stage until a method is called with arguments for which `when` says so."""
    process = multiprocessing.get_context("fork").Process(target=_run_until_killed, args=(stage, owner, method, when))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def assert_resumes(stages: Sequence[StageRequest], module: type, step: int) -> list[Record]:
    """Kill the second of two equal stages in a step: resumed, it equals the first, which ran through."""
    kill_at(stages[1], module, step)
    assert not (stages[1].directory / "record.json").exists()
    made = [run_stage(stage) for stage in stages]
    compare(*stages)
    assert made[0].metrics == made[1].metrics
    assert made[0].steps == made[1].steps
    return made


def kill_at(stage: StageRequest, module: type, step: int) -> None:
    """Run a stage until it is in the middle of a step."""
    kill_when(stage, module, "training_step", lambda self, *_: self.trainer.global_step == step)


def assert_equal(left: Any, right: Any, where: str = "checkpoint") -> None:
    """Equal types, shapes and bits, all the way down."""
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


def compare(whole: StageRequest, resumed: StageRequest) -> None:
    states = [
        torch.load(stage.directory / "checkpoints" / "last.ckpt", weights_only=True) for stage in (whole, resumed)
    ]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_equal(states[0][key], states[1][key], key)
    logged = [(stage.directory / "metrics.csv").read_text(encoding="utf-8") for stage in (whole, resumed)]
    assert logged[0] == logged[1]
    assert "train/loss" in logged[0]
