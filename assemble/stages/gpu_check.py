"""Measures a paper's training step and its kernels on this machine's device, with synthetic batches."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile
from torch.utils import benchmark

from assemble.reporting import records
from assemble.reporting.papers import checkout, paper_named
from assemble.reporting.records import Record
from assemble.stages.configuration import resolve
from assemble.stages.estimate import estimate
from assemble.stages.synthetic import StopAfter, quiet, synthetic_training
from common.errors import StageError
from common.training.callbacks import StepSeed
from common.training.examples import RandomTensors

#: Devices among which the recipe's global batch is divided.
DEVICES = 8


def measure(
    paper: str,
    recipe: str | None = None,
    *,
    device: str = "cuda",
    precision: str = "bf16-mixed",
    scale: str = "paper",
    size: int | None = None,
    arguments: Sequence[str] = (),
) -> tuple[Record, dict[str, float]]:
    """Time 20 batches (2 at smoke) of a recipe's training, then profile up to 5 more.

    Args:
        recipe: a recipe that trains; None for the paper's main recipe.
        size: samples per batch; None for an eighth of the recipe's batch.

    Returns:
        A record with the metrics below, and the seconds of each kernel in a step.
        `step_seconds`, `step_seconds_std`: median and standard deviation.
        `flops`: estimated operations of a step.
        `matrix_rate`: operations per second of a large matrix product on the same device.
        `peak_bytes`: peak memory of all tensors. On the CPU, this and the next two metrics are None.
        `host_waits`: how often a step makes the host wait for the device.
        `idle_share`: share of a step in which the device runs no kernel, 0 to 1.
    """
    name = paper_named(paper).name
    cuda = device == "cuda"
    run = resolve(name, recipe or paper_named(paper).recipe, scale=scale, hardware="gpu8", arguments=arguments)
    small = scale == "smoke"
    size = size or (4 if small else max(int(run.config["data"]["init_args"]["batch_size"]) // DEVICES, 2))
    steps = 2 if small else 20
    watch = _Watch(cuda, 1 if small else 5, steps)
    trainer = {
        "accelerator": "gpu" if cuda else "cpu",
        "devices": 1,
        "precision": precision,
        "callbacks": [StepSeed(), watch, StopAfter(watch.last + watch.profiled + 1)],
    }
    started = datetime.now(UTC).replace(microsecond=0)
    estimated = estimate(run, size)
    rate = matrix_rate(device, precision, side=8192 if cuda else 256)
    try:
        with quiet(), warnings.catch_warnings(record=True, action="always") as caught:
            synthetic_training(run, trainer, RandomTensors(), size).run()
    except torch.OutOfMemoryError as error:
        raise StageError(
            f"recipe {run.recipe}: {size} samples do not fit into the device's memory; lower --batch-size ({error})"
        ) from None
    waits = sum("called a synchronizing" in str(warning.message) for warning in caught)
    metrics = {"flops": estimated.flops / estimated.accumulated, "matrix_rate": rate, **watch.metrics(waits)}
    config_hash = records.config_hash(run.config)
    record = Record(
        paper=run.paper,
        stage=f"gpu_check_{run.recipe}",
        recipe=run.recipe,
        job="evaluate",
        row=None,
        scale=run.scale,
        seed=0,
        metrics=metrics,
        config_hash=config_hash,
        lineage_hash=records.lineage_hash(config_hash, {}),
        config=run.config,
        git=records.git_state(checkout()),
        versions=records.versions(),
        hardware=records.hardware([torch.cuda.get_device_name()] if cuda else []),
        precision=precision,
        global_batch=size,
        steps=steps,
        started=started.isoformat(),
        wall_seconds=(datetime.now(UTC) - started).total_seconds(),
    )
    return record, watch.kernels()


def matrix_rate(device: str, precision: str, side: int) -> float:
    """Measure the operations per second of a product of square matrices, in the trainer's precision."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0], torch.float32)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timer = benchmark.Timer("left @ right", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    timer.timeit(2)
    return 2 * side**3 / timer.timeit(10).median


class _Watch(Callback):
    """Times `steps` batches after the warm-up, then profiles up to five more batches."""

    def __init__(self, cuda: bool, warm_up: int, steps: int) -> None:
        self.cuda = cuda
        self.warm_up = warm_up
        self.last = warm_up + steps
        self.profiled = min(steps, 5)
        self.peak = 0
        self._marks: list[Any] = []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last + 1:
            self._profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.cuda and batch_idx == self.warm_up:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("warn")
        if self.warm_up <= batch_idx <= self.last:
            self._marks.append(self._mark())
        if self.cuda and batch_idx >= self.last:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        if self.cuda and batch_idx == self.last:
            self.peak = torch.cuda.max_memory_allocated()
        if batch_idx == self.last + self.profiled:
            self._profiler.stop()

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        pairs = zip(self._marks, self._marks[1:])
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]

    def metrics(self, waits: int) -> dict[str, float | None]:
        """Return the metrics that `measure` documents. `waits` is how often the timed steps made the host wait."""
        step, steps = statistics.median(self.seconds()), self.last - self.warm_up
        return {
            "step_seconds": step,
            "step_seconds_std": statistics.pstdev(self.seconds()),
            "peak_bytes": float(self.peak) if self.cuda else None,
            "host_waits": waits / steps if self.cuda else None,
            "idle_share": max(1 - sum(self.kernels().values()) / step, 0.0) if self.cuda else None,
        }

    def kernels(self) -> dict[str, float]:
        """Return the seconds of each kernel (on the CPU: of each operation) in a step, longest first."""
        seconds: Counter[str] = Counter()
        for event in self._profiler.key_averages():
            if self.cuda:
                # Named spans, such as the optimizer's, contain kernels that are listed separately.
                kernel = str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
                micros = event.self_device_time_total if kernel else 0.0
            else:
                micros = event.self_cpu_time_total if event.key.startswith("aten::") else 0.0
            if micros > 0:
                seconds[event.key] += micros / 1e6 / self.profiled  # type: ignore[assignment]
        return dict(seconds.most_common())
