"""Whole training steps: of every paper on synthetic batches, and what a second process brings to AVID.

Wall time of steps alone: what comes before the first ones (start, decoding, process groups) is left out.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from common.reporting.papers import existing_papers, paper_named
from common.stages.cli import StageCLI, build
from common.stages.configuration import resolve
from common.stages.gpu_check import measure
from common.stages.run import stage_configuration
from tests.benchmarks.speed import Line, add, amount
from tests.distributed.harness import run_distributed
from tests.stages import request

WARM_UP, BATCH = 8, 32
STEPS = WARM_UP + min(32, 4 * int(os.environ.get("BENCH_ROUNDS", 8)))
LAYER: dict[str, Any] = {
    "trainer": {"max_epochs": 1, "limit_train_batches": STEPS, "log_every_n_steps": 1000, "callbacks": []},
    "model": {
        "init_args": {
            "video_encoder": {"init_args": {"width": 12}},
            "audio_encoder": {"init_args": {"width": 12}},
        }
    },
    "data": {"init_args": {"clips_per_video": 64, "batch_size": BATCH}},
}


class StepClock(Callback):
    """Seconds of every step after the first ones."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._ended = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if batch_idx >= WARM_UP:
            self.seconds.append(now - self._ended)
        self._ended = now


def _steps(folder: Path, *overrides: str) -> StepClock:
    """Train one short epoch; its steps."""
    stage = request("avid/avid", folder, *overrides, layer=LAYER)
    clock = StepClock()
    arguments = {"logger": False, "enable_checkpointing": False, "callbacks": [clock]}
    cli: StageCLI = build(
        stage.configuration, stage_configuration(stage), {"default_root_dir": str(folder), **arguments}
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return clock


@pytest.mark.parametrize("paper", [paper.short for paper in existing_papers()])
def test_a_step_of_every_miniature(paper: str) -> None:
    """Baseline: its arithmetic, at the rate of a product of two matrices of 256 rows in the same run."""
    recipe = paper_named(paper).recipe
    run = resolve(paper_named(paper).name, recipe, scale="mini", hardware="cpu")
    size = int(run.config["data"]["init_args"]["batch_size"])
    steps = min(20, 2 * int(os.environ.get("BENCH_ROUNDS", 10)))
    record, _ = measure(paper, device="cpu", precision="32-true", scale="mini", size=size, warm_up=3, steps=steps)
    found: dict[str, Any] = record.metrics
    seconds, arithmetic = found["step_seconds"], found["flops"] / found["matrix_rate"]
    noise = found["step_seconds_std"] / seconds / steps**0.5
    what = f"a step of {recipe} at mini, {size} samples, {size / seconds:.0f} a second"
    ratio = seconds / arithmetic
    add(Line(what, "its arithmetic alone", amount(seconds), amount(arithmetic), ratio, ratio * noise))


def _median_step(rank: int, folder: str, world: int) -> float:
    os.environ["WANDB_MODE"] = "disabled"
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
            TORCHELASTIC_RUN_ID="bench", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
        )  # fmt: skip
    strategy = ["--trainer.strategy", "ddp"] if world > 1 else []
    size = ("--trainer.devices", str(world), "--data.batch_size", str(BATCH * world))
    return statistics.median(_steps(Path(folder) / str(rank), *size, *strategy).seconds)


def test_two_processes_against_one(tmp_path: Path) -> None:
    """Baseline: one process, one thread, at the same batch per process; in turns."""
    one: list[float] = []
    joined: list[float] = []
    for number in range(min(3, int(os.environ.get("BENCH_ROUNDS", 3)))):
        with multiprocessing.get_context("fork").Pool(1, torch.set_num_threads, (1,)) as pool:
            one.append(pool.apply(_median_step, (0, str(tmp_path / f"one-{number}"), 1)))
        joined.append(max(run_distributed(_median_step, 2, str(tmp_path / f"joined-{number}"), 2)))
    mine, other = (statistics.median(seconds) for seconds in (joined, one))
    add(Line("AVID's step, 2 processes", "1 process, half the batch", amount(mine), amount(other), mine / other))
    add(Line("efficiency of 2 processes", "1 process", f"{other / mine:.0%}", ""))
