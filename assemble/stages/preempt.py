"""Saves a training stage when a signal asks it to stop, and requeues its SLURM job."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from assemble.stages import stopping
from assemble.stages.stopping import REQUEUE_SIGNAL
from common.errors import STOP, Preempted

#: Seconds to save a checkpoint, and then to close the W&B run.
SAVING = 600.0
CLOSING = 30.0
#: Seconds after which a rank that got a signal before training is killed. It may be waiting for a rank that ended.
STARTING = 2.0


class Preemption(Callback):
    """Saves after the step in which a signal arrives. Outside training, the stage ends at the next hook."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.signal: int | None = None
        self.saved_step: int | None = None
        #: Closes the W&B run.
        self.close: Callable[[], object] = lambda: None

    def _check(self, *_: Any, **__: Any) -> None:
        STOP.check()

    setup = on_test_batch_start = _check

    def _begin(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        stopping.allow(stopping.PATIENCE)
        if trainer.world_size == 1:  # several ranks agree after a step
            STOP.check()

    on_train_start = on_test_start = _begin

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # a checkpoint can't hold accumulated gradients
        received, again = STOP.received, STOP.received == REQUEUE_SIGNAL
        asked = received is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
            if asked:
                again = trainer.strategy.reduce_boolean_decision(again, all=False)
        if asked:
            self.signal = REQUEUE_SIGNAL if again else received or signal.SIGTERM
            stopping.allow(SAVING)
            trainer.save_checkpoint(self.checkpoint)
            stopping.allow(2 * CLOSING)
            self.saved_step = trainer.global_step

    def _leave(self, *_: Any, **__: Any) -> None:
        if self.saved_step is not None and self.signal is not None:
            raise Preempted(self.signal)

    # A step's logs are written after its last hook, so the run ends at the next hook.
    on_train_batch_start = on_validation_start = on_train_epoch_end = _leave

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Preempted) and exception.signal == REQUEUE_SIGNAL and trainer.is_global_zero:
            # SLURM ends W&B's process as soon as the job is requeued; a server that hangs must not prevent that.
            closing = threading.Thread(target=self.close, daemon=True)
            closing.start()
            closing.join(CLOSING)
            requeue(exception.signal)

    def describe(self, stage: str, number: int) -> str:
        where = "no checkpoint was saved yet: rerun the command to start again"
        if self.saved_step is not None:
            where = f"after step {self.saved_step} and saved in {self.checkpoint}; rerun the command to resume"
        elif self.checkpoint.is_file():
            where = "rerun the command to resume from its last checkpoint"
        return f"{stage}: stopped by {signal.Signals(number).name}{' ' if self.saved_step is not None else '; '}{where}"


def requeue(number: int) -> None:
    """Requeue this SLURM job, if the signal warns of its time limit. Workers leave this to their main process."""
    if number == REQUEUE_SIGNAL and multiprocessing.parent_process() is None:
        _requeue()


@functools.cache
def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    # Another process of the job may have requeued it.
    if problem and "pending execution" not in problem:
        print(f"  job {job} could not be requeued ({problem}); submit it again to resume", flush=True)
    else:
        print(f"  job {job} was requeued", flush=True)
