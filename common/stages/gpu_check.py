"""How fast a paper's training step runs on this machine's device, and where its time goes, without any data.

The stage's own module trains on made-up batches (see `synthetic.py`) at the widths of the paper. Measured are the time
of a step, its arithmetic against what the same card does in a large product of matrices, memory, how often the host
waits for the device, and which kernels take the time.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from common.errors import StageError
from common.reporting import records
from common.reporting.gpu import MeasuredStep
from common.reporting.papers import checkout, paper_named
from common.stages.configuration import RunConfiguration, resolve
from common.stages.meters import operation_counter
from common.stages.synthetic import StopAfter, synthetic_training
from common.training.callbacks import StepSeed
from common.training.examples import Draw

#: Parts of the names of kernels that multiply matrices, convolve or attend, in CUDA's libraries and on the CPU.
BIG_KERNELS = (
    "gemm", "gemv", "cutlass", "xmma", "wgmma", "hmma", "nvjet", "conv", "dgrad", "wgrad", "fprop", "winograd",
    "implicit", "fmha", "flash", "attention", "mkldnn", "addmm", "bmm", "aten::mm",
)  # fmt: skip
#: But not those in whose names one of these stands: they only prepare for the former.
SMALL_KERNELS = ("nchwtonhwc", "nhwctonchw", "converttype", "tensortransform", "batch_norm", "layout", "convert")
#: Batches of one device that the paper's machines had, where the recipe's global batch is for several.
DEVICES = 8


def measure(
    paper: str,
    recipe: str | None = None,
    *,
    device: str = "cuda",
    precision: str = "bf16-mixed",
    scale: str = "paper",
    size: int | None = None,
    warm_up: int = 5,
    steps: int = 20,
    arguments: Sequence[str] = (),
) -> MeasuredStep:
    """Measure a recipe's training step.

    Args:
        paper: package or short name.
        recipe: one that trains; None for the paper's main one.
        device: `cuda` or `cpu`.
        precision: of the trainer.
        scale: whose widths.
        size: samples of a batch; None for the share of one of eight devices in the recipe's batch.
        warm_up, steps: batches before the measurement, and in it. As many again are profiled, at most 5.
        arguments: overrides, as on the command line.

    Raises:
        StageError: there is no such device, or it has too little memory.
    """
    name = paper_named(paper).name
    if device == "cuda" and not torch.cuda.is_available():
        raise StageError("--device cuda: torch finds no GPU on this machine; --device cpu --small runs the same code")
    # The layer for eight GPUs sets the share of a device; where the global batch is for fewer, it is taken whole.
    recipe = recipe or paper_named(paper).recipe
    run = resolve(name, recipe, scale=scale, hardware="gpu8", arguments=arguments)
    whole = int(run.config["data"]["init_args"]["batch_size"])
    size = size or max(whole // DEVICES, 2)
    profiled = min(steps, 5)
    watch = _Watch(device, warm_up, steps, profiled)
    trainer = {
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "devices": 1,
        "precision": precision,
        "callbacks": [StepSeed(), watch, StopAfter(warm_up + 1 + steps + profiled)],
    }
    rate = matrix_rate(device, precision, side=8192 if device == "cuda" else 256)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training = synthetic_training(run, trainer, Draw(), size)
            training.run()
    except torch.OutOfMemoryError as error:
        raise StageError(
            f"{name}, recipe {run.recipe}: {size} samples do not fit into the device's memory; give --batch-size "
            f"({error})"
        ) from None
    finally:
        watch.close()
    waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
    return watch.result(run, size, rate, precision, len(waits))


def matrix_rate(device: str, precision: str, side: int = 8192, repeats: int = 10) -> float:
    """Operations per second of a product of two square matrices on the device, in the precision of the trainer.

    Args:
        device: `cuda` or `cpu`.
        precision: of the trainer; mixed ones multiply in their half precision.
        side: rows of the matrices.
        repeats: products that are timed.
    """
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0], torch.float32)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 2):
        start = _mark(device)
        torch.mm(left, right)
        end = _mark(device)
        times.append(_seconds(device, start, end))
    return 2 * side**3 / statistics.median(times[2:])


def _mark(device: str) -> Any:
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(device: str, start: Any, end: Any) -> float:
    if device != "cuda":
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


@dataclass(eq=False)
class _Watch(Callback):
    """Counts, times and profiles the batches of a training.

    After some batches to warm up, one is counted (arithmetic), the next are timed, and the last are profiled.
    """

    device: str
    warm_up: int
    steps: int
    profiled: int
    marks: list[Any] = field(default_factory=list)
    flops: int = 0
    host_waits: int = 0
    peak: int = 0
    _counter: FlopCounterMode | None = None
    _profiler: profile | None = None
    _events: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warm_up:
            self._counter = operation_counter()
            self._counter.__enter__()
        elif batch_idx == self.warm_up + 1:
            self._synchronize()
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.set_sync_debug_mode("warn")
            self.marks.append(_mark(self.device))
        elif batch_idx == self.warm_up + 1 + self.steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
            self._profiler = profile(activities=activities)
            self._synchronize()
            self._profiler.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops = self._counter.get_total_flops()
            self._counter = None
        last = self.warm_up + self.steps
        if self.warm_up < batch_idx <= last:
            self.marks.append(_mark(self.device))
        if batch_idx == last:
            self._synchronize()
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                self.peak = torch.cuda.max_memory_allocated()
        if batch_idx == last + self.profiled:
            self.close()

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        """End what may still be recording."""
        if self._profiler is not None:
            self._synchronize()
            self._profiler.__exit__(None, None, None)
            self._events, self._profiler = self._profiler.key_averages(), None
        if self.device == "cuda" and torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")

    def result(self, run: RunConfiguration, size: int, rate: float, precision: str, waits: int) -> MeasuredStep:
        """What was measured.

        Args:
            run, size, precision: what ran.
            rate: of a product of matrices, operations per second.
            waits: how often the host waited in the timed batches.
        """
        self._synchronize()
        times = [_seconds(self.device, a, b) for a, b in zip(self.marks, self.marks[1:])]
        kernels = kernel_times(self._events, self.device)
        busy = sum(kernels.values())
        big = sum(seconds for name, seconds in kernels.items() if is_big(name))
        seconds = statistics.median(times)
        card = torch.cuda.get_device_name() if self.device == "cuda" else records.hardware([])["cpu"]
        return MeasuredStep(
            paper=run.paper,
            recipe=run.recipe,
            scale=run.scale,
            card=str(card),
            date=datetime.now(UTC).date().isoformat(),
            git=records.git_state(checkout()),
            versions=records.versions(),
            precision=precision,
            batch=size,
            steps=len(times),
            seconds=seconds,
            seconds_spread=statistics.pstdev(times),
            flops=self.flops,
            matrix_rate=rate,
            peak_bytes=self.peak,
            host_waits=round(waits / len(times), 2) if self.device == "cuda" else None,
            outside_big_share=1 - big / busy if busy else None,
            idle_share=max(1 - busy / self.profiled / seconds, 0.0) if self.device == "cuda" else None,
            kernels=[
                {"name": name[:120], "seconds": total / self.profiled, "share": total / busy, "big": is_big(name)}
                for name, total in Counter(kernels).most_common(10)
            ],
        )


def kernel_times(events: Any, device: str) -> dict[str, float]:
    """Seconds of each kernel on the device over all profiled batches; of each operation itself on the CPU."""
    found: dict[str, float] = {}
    for event in events:
        if device == "cuda":
            # Spans that somebody named, such as the optimizer's, hold kernels that are listed by themselves.
            kernel = str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
            micros = event.self_device_time_total if kernel else 0.0
        else:
            micros = event.self_cpu_time_total if event.key.startswith("aten::") else 0.0
        if micros > 0:
            found[event.key] = found.get(event.key, 0.0) + micros / 1e6
    return found


def is_big(kernel: str) -> bool:
    """Whether a kernel multiplies matrices, convolves or attends."""
    name = kernel.lower()
    return any(part in name for part in BIG_KERNELS) and not any(part in name for part in SMALL_KERNELS)
