"""How well a training step is fed, and what a second process brings. Ratios in one run; `make bench` prints them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from common.stages.cli import StageCLI, build
from common.stages.run import stage_configuration
from tests.distributed.harness import run_distributed
from tests.stages import request

STEPS = 24
LAYER: dict[str, Any] = {
    "trainer": {"max_epochs": 1, "limit_train_batches": STEPS, "log_every_n_steps": 1000, "callbacks": []},
    "model": {
        "init_args": {
            "video_encoder": {"init_args": {"width": 12}},
            "audio_encoder": {"init_args": {"width": 12}},
        }
    },
    "data": {"init_args": {"clips_per_video": 32, "batch_size": 32}},
}


def _built(folder: Path, *overrides: str) -> StageCLI:
    stage = request("avid/avid", folder, *overrides, layer=LAYER)
    run, config = stage_configuration(stage)
    return build(run, config, {"default_root_dir": str(folder), "logger": False, "enable_checkpointing": False})


@pytest.mark.parametrize("workers", [0, 1])
def test_share_of_a_step_spent_waiting_for_data(benchmark: Any, tmp_path: Path, workers: int) -> None:
    """Baseline: the training steps alone, on a batch that is there already."""
    cli = _built(tmp_path, "--data.num_workers", str(workers))
    module = type(cli.model)
    original, compute = module.training_step, [0.0]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)  # decodes and caches

    def fit() -> float:
        again = _built(tmp_path, "--data.num_workers", str(workers))
        waits: list[float] = []
        started = [0.0]

        def step(self: Any, batch: Any, batch_idx: int) -> Any:
            if started[0]:
                waits.append(time.perf_counter() - started[0])
            return original(self, batch, batch_idx)

        def after(*args: Any, **kwargs: Any) -> None:
            started[0] = time.perf_counter()

        module.training_step, module.on_train_batch_end = step, after  # type: ignore[method-assign, assignment]
        clock = time.perf_counter()
        try:
            again.trainer.fit(again.model, datamodule=again.datamodule)
        finally:
            module.training_step = original  # type: ignore[method-assign]
            del module.on_train_batch_end
        compute[0] = time.perf_counter() - clock
        return sum(waits) / compute[0]

    idle = benchmark.pedantic(fit, rounds=2, iterations=1)
    benchmark.extra_info["idle share, baseline: the whole fit"] = round(idle, 3)
    print(f"\nworkers={workers}: {idle:.1%} of the fit waits for data")


def _steps_per_second(rank: int, folder: str, world: int) -> float:
    os.environ["WANDB_MODE"] = "disabled"
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
            TORCHELASTIC_RUN_ID="bench", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
        )  # fmt: skip
    strategy = ["--trainer.strategy", "ddp"] if world > 1 else []
    cli = _built(
        Path(folder) / str(rank), "--trainer.devices", str(world), "--data.batch_size", str(32 * world), *strategy
    )
    clock = time.perf_counter()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return STEPS * 32 * world / (time.perf_counter() - clock)


def test_two_processes_against_one(benchmark: Any, tmp_path: Path) -> None:
    """Baseline: one process, one thread. Clips per second at the same batch per process."""
    run_distributed(_steps_per_second, 1, 120, str(tmp_path / "warm"), 1)

    def compare() -> tuple[float, float]:
        one = run_distributed(_steps_per_second, 1, 120, str(tmp_path / "one"), 1)[0]
        two = min(run_distributed(_steps_per_second, 2, 120, str(tmp_path / "two"), 2))
        return one, two

    one, two = benchmark.pedantic(compare, rounds=1, iterations=1)
    benchmark.extra_info["scaling efficiency of 2 processes, baseline: 1 process"] = round(two / one / 2, 3)
    print(f"\n1 process: {one:.0f} clips/s, 2 processes: {two:.0f} clips/s, efficiency {two / one / 2:.0%}")
