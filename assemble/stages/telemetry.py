"""Log learning rates, gradient norms, speed, memory and the time spent waiting for data."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from assemble.stages.loggers import MetricsFile


class Telemetry(Callback):
    """Logs learning rates and gradient norms (before clipping) at every logging step.

    Machine-dependent values stay out of `metrics.csv`, so a resumed run leaves the same file as an uninterrupted one.
    """

    def __init__(self) -> None:
        self._norms: dict[int, torch.Tensor] = {}
        self._rates: list[float] = []
        self._restart()

    def _restart(self, *_: Any, **__: Any) -> None:
        self._began = self._ended = time.monotonic()
        self._waited = 0.0
        self._batches = 0

    # Don't count the time to start loader processes and to validate.
    on_train_epoch_start = on_validation_end = _restart

    @staticmethod
    def _logs(trainer: pl.Trainer) -> bool:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        stepped = trainer.fit_loop.epoch_loop._batches_that_stepped
        return bool(trainer.loggers) and (stepped + 1) % max(every, 1) == 0

    def on_train_batch_start(self, *_: Any) -> None:
        self._waited += time.monotonic() - self._ended

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._logs(trainer):
            return
        self._rates = _rates_of(trainer)  # schedulers change them before the batch ends
        self._note_norm(trainer.optimizers.index(optimizer), optimizer)

    def _note_norm(self, place: int, optimizer: torch.optim.Optimizer) -> None:
        held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [gradient.detach() for gradient in held if not gradient.is_sparse]
        if gradients:
            self._norms[place] = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._batches += 1
        loop = trainer.fit_loop.epoch_loop
        if not self._logs(trainer) or loop._should_accumulate():
            self._ended = time.monotonic()
            return
        step = loop._batches_that_stepped
        for place, optimizer in enumerate(trainer.optimizers if len(trainer.optimizers) > 1 else ()):
            if place not in self._norms:  # Lightning calls the hook for one optimizer only
                self._note_norm(place, optimizer)
        of_run = self._of_run(trainer)
        self._ended = time.monotonic()  # reading the norms waited for the device
        of_machine = self._of_machine(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(of_run if isinstance(logger, MetricsFile) else {**of_run, **of_machine}, step=step)
        self._restart()

    def _of_run(self, trainer: pl.Trainer) -> dict[str, float]:
        rates = self._rates or _rates_of(trainer)
        norms = {place: float(norm) for place, norm in sorted(self._norms.items())}
        self._norms.clear()
        self._rates = []
        several = len(trainer.optimizers) > 1
        return {
            **{f"learning_rate/{i}" if len(rates) > 1 else "learning_rate": rate for i, rate in enumerate(rates)},
            **{f"gradient_norm/{i}" if several else "gradient_norm": norm for i, norm in norms.items()},
        }

    def _of_machine(self, trainer: pl.Trainer) -> dict[str, float]:
        seconds = max(self._ended - self._began, 1e-9)
        values = {"speed/data_waiting_share": min(self._waited / seconds, 1.0)}
        if size := getattr(getattr(trainer, "datamodule", None), "batch_size", None):
            values["speed/samples_per_second"] = self._batches * size / seconds
        device = trainer.strategy.root_device
        if device.type == "cuda":
            values["memory/gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        elif (held := peak_memory_gib()) is not None:
            values["memory/process_gib"] = held
        return values


def _rates_of(trainer: pl.Trainer) -> list[float]:
    return [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]


def reset_peak_memory() -> None:
    """Reset the peak memory, if the system allows a reset."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gib() -> float | None:
    """Return the peak resident memory in GiB since the last reset, without loader processes; None if unknown."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE):
            return round(int(match[1]) / 2**20, 2)
    return None
