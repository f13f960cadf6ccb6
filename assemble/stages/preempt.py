"""Saves a training stage when a signal asks it to stop, and requeues its SLURM job."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from assemble.stages.stopping import REQUEUE_SIGNAL, check, postpone, received
from common.errors import Preempted

#: Seconds to save a checkpoint.
SAVING = 600.0


class Preemption(Callback):
    """Saves after the step in which a signal arrives. Outside training, the stage ends at the next hook."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.signal: int | None = None
        self.saved_step: int | None = None
        self._asked = False

    def _check(self, *_: Any, **__: Any) -> None:
        check()

    setup = on_train_start = on_test_batch_start = _check

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # a checkpoint has no gradients
        own, again = received(), received() == REQUEUE_SIGNAL
        asked = own is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
            if asked:
                again = trainer.strategy.reduce_boolean_decision(again, all=False)
        if asked:
            self.signal = REQUEUE_SIGNAL if again else own or signal.SIGTERM
            postpone(SAVING)
            trainer.save_checkpoint(self.checkpoint)
            postpone(SAVING / 20)
            self.saved_step = trainer.global_step

    def _leave(self, *_: Any, **__: Any) -> None:
        if self.saved_step is not None and self.signal is not None:
            raise Preempted(self.signal)

    # A step's logs are written after its last hook, so the run ends at the next one.
    on_train_batch_start = on_validation_start = on_train_epoch_end = _leave

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Requeue first: closing the trainer and W&B may use up SLURM's grace period.
        if isinstance(exception, Preempted) and trainer.is_global_zero:
            self.queue_again(exception.signal)

    def queue_again(self, number: int) -> None:
        """Requeue this job once, if the signal is SLURM's warning before its end."""
        if number == REQUEUE_SIGNAL and not self._asked:
            self._asked = True
            print(f"  {requeue()}", flush=True)

    def describe(self, stage: str, number: int) -> str:
        where = "no checkpoint was saved yet: rerun the command to start again"
        if self.saved_step is not None:
            where = f"after step {self.saved_step} and saved in {self.checkpoint}; rerun the command to resume"
        elif self.checkpoint.is_file():
            where = "rerun the command to resume from its last checkpoint"
        return f"{stage}: stopped by {signal.Signals(number).name}{' ' if self.saved_step is not None else '; '}{where}"


def requeue() -> str:
    """Requeue this SLURM job, unless one of its processes did; returns the outcome to print."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    mark = Path(tempfile.gettempdir(), f"assemble-requeued-{job}-{os.environ.get('SLURM_RESTART_COUNT', 0)}")
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return f"job {job} was requeued"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        problem = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is None:
        return f"job {job} was requeued"
    mark.unlink()
    return f"job {job} could not be requeued ({problem}); submit it again to resume"
