"""Time training steps of every paper on synthetic batches, and AVID's steps in two processes.

The wall time leaves out everything before the first steps, such as startup and the process group.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from assemble.reporting.papers import existing_papers, paper_named
from assemble.stages.cli import StageCLI, build
from assemble.stages.configuration import resolve
from assemble.stages.gpu_check import measure
from assemble.stages.run import stage_configuration
from common.data.samplers import EpochSampler
from tests.benchmarks.speed import Line, add, amount, compare
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
    """Measure the seconds of every step after the warm-up."""

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


def _build(folder: Path, *overrides: str, callbacks: Sequence[Callback] = ()) -> StageCLI:
    stage = request("avid/avid", folder, *overrides, layer=LAYER)
    arguments = {"logger": False, "enable_checkpointing": False, "callbacks": list(callbacks)}
    return build(stage.configuration, stage_configuration(stage), {"default_root_dir": str(folder), **arguments})


@pytest.mark.parametrize("paper", [paper.short for paper in existing_papers()])
def test_a_step_of_every_miniature(paper: str) -> None:
    """Compare with the time that the step's FLOPs would take at the speed of a 256-row matrix product."""
    recipe = paper_named(paper).recipe
    run = resolve(paper_named(paper).name, recipe, scale="mini", hardware="cpu")
    size = int(run.config["data"]["init_args"]["batch_size"])
    record, _ = measure(paper, device="cpu", precision="32-true", scale="mini", size=size)
    found: dict[str, Any] = record.metrics
    seconds, arithmetic = found["step_seconds"], found["flops"] / found["matrix_rate"]
    noise = found["step_seconds_std"] / seconds / record.steps**0.5
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
    clock = StepClock()
    cli = _build(Path(folder) / str(rank), *size, *strategy, callbacks=[clock])
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return statistics.median(clock.seconds)


def _median_step_of_plain_pytorch(rank: int, folder: str, world: int) -> float:
    """Time the same networks, loss, optimizer and clips in a plain PyTorch loop."""
    cli = _build(Path(folder) / str(rank))
    module, data = cli.model, cli.datamodule
    data.prepare_data()
    data.setup("fit")
    module.loss.allocate(len(data.listing), module.hparams["out_dim"])
    optimizer = module.configure_optimizers()["optimizer"]
    network = DistributedDataParallel(module.model) if world > 1 else module.model
    sampler = EpochSampler(len(data.training_clips), BATCH * world, 0, rank, world)
    ends = []
    for batch in itertools.islice(DataLoader(data.training_clips, BATCH, sampler=sampler), STEPS):
        terms = module.loss(*network(batch["video"], batch["audio"]), batch["index"])
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        ends.append(time.perf_counter())
    assert len(ends) == STEPS
    return statistics.median(end - start for start, end in itertools.pairwise(ends[WARM_UP - 1 :]))


def test_two_processes_against_one(tmp_path: Path) -> None:
    """Compare with plain DistributedDataParallel and with two separate processes, at the same batch per process."""
    loops = {"ours": _median_step, "plain": _median_step_of_plain_pytorch}
    one: dict[str, list[float]] = {name: [] for name in loops}
    joined: dict[str, list[float]] = {name: [] for name in loops}
    apart = []
    for number in range(min(3, int(os.environ.get("BENCH_ROUNDS", 3)))):
        for name, loop in loops.items():
            folder = str(tmp_path / f"{name}-{number}")
            with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
                one[name].append(pool.apply(loop, (0, f"{folder}-one", 1)))
            joined[name].append(max(run_distributed(loop, 2, f"{folder}-joined", 2)))
        with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
            apart.append(max(pool.starmap(_median_step, [(rank, f"{folder}-apart", 1) for rank in range(2)])))
    compare("AVID's step, 1 process", "plain PyTorch", one["ours"], one["plain"])
    compare("AVID's step, 2 processes", "plain DDP", joined["ours"], joined["plain"])
    alone = statistics.median(one["ours"])
    efficiency = {name: statistics.median(one[name]) / statistics.median(joined[name]) for name in loops}
    efficiency["apart"] = alone / statistics.median(apart)
    for other, name in (("plain DDP", "plain"), ("2 runs of 1 process at once", "apart")):
        add(Line("efficiency of 2 processes", other, f"{efficiency['ours']:.0%}", f"{efficiency[name]:.0%}"))
