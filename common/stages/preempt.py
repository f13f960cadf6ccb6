"""What a stage does when it is asked to end: by SLURM before its time is over, by `kill`, by a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from common.errors import Preempted

#: SLURM sends this one some time before the end of a job (`sbatch --signal`); then the job asks to be queued again.
REQUEUE_SIGNAL = signal.SIGUSR1


class Preemption(Callback):
    """Saves the state after the step that is being made when a signal arrives, and ends the stage.

    Lightning's own handler saves at once, in the middle of a step, where a queue may be written and the optimizer not
    stepped, and where every rank is somewhere else. Here the signal is only noted. After a step all ranks agree on
    whether one of them has noted it, save together and leave.

    Outside training there is nothing to save: the stage ends at once.

    Args:
        checkpoint: file to save to, the one that the stage goes on from.
        every_n_steps: how often several ranks ask each other; a process of its own looks after every step.
    """

    def __init__(self, checkpoint: Path, every_n_steps: int = 10) -> None:
        self.checkpoint = checkpoint
        self.every_n_steps = every_n_steps
        self.received: int | None = None
        self.saved_step: int | None = None
        self._training = False
        self._launcher: Any = None
        self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, SIGTERM ends the stage, and within a job of SLURM SIGUSR1 too."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in self._signals()}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @staticmethod
    def _signals() -> list[signal.Signals]:
        return [signal.SIGTERM, *([REQUEUE_SIGNAL] if "SLURM_JOB_ID" in os.environ else [])]

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals():
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        first, self.received = self.received is None, number
        if first and self._launcher is not None:
            self._launcher.kill(number)  # ranks that Lightning started are unknown to whoever sent the signal
        if not self._training:
            raise Preempted(number)

    # Lightning puts handlers of its own over these whenever it starts to fit or to test.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        launcher = trainer.strategy.launcher
        self._launcher = launcher if hasattr(launcher, "kill") else None
        self._listen()
        self._training = True

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # a checkpoint holds no gradients
        asked = self.received is not None
        if trainer.world_size > 1:
            if trainer.global_step % self.every_n_steps:
                return
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
            if asked:
                again = trainer.strategy.reduce_boolean_decision(self.received == REQUEUE_SIGNAL, all=False)
                self.received = REQUEUE_SIGNAL if again else signal.SIGTERM
        if asked:
            trainer.save_checkpoint(self.checkpoint)
            self.saved_step = trainer.global_step

    # What this step logs is written after its last hook, so the run ends at the first hook behind it.

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._leave()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave()

    def _leave(self) -> None:
        if self.saved_step is not None and self.received is not None:
            raise Preempted(self.received)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # At once: what ends the trainer and W&B may take all the time that SLURM gives.
        if isinstance(exception, Preempted) and trainer.is_global_zero:
            self.queue_again()

    def training_ended(self) -> None:
        """Call when the last checkpoint of training is written: from here on the stage ends at once.

        Raises:
            Preempted: a signal came since the last step.
        """
        self._training = False
        if self.received is not None:
            raise Preempted(self.received)

    def queue_again(self) -> None:
        """Ask SLURM to queue this job again, once, and if it was SLURM that ends it."""
        if self.received == REQUEUE_SIGNAL and not self._asked:
            self._asked = True
            print(f"  {requeue()}", flush=True)

    def describe(self, stage: str) -> str:
        """What happened, and how to go on."""
        name = signal.Signals(self.received or signal.SIGTERM).name
        where = "" if self.saved_step is None else f" after step {self.saved_step}, its state is in {self.checkpoint}"
        return f"{stage}: stopped by {name}{where}; the same command goes on from there"


def requeue() -> str:
    """Ask SLURM to queue this job again; returns what came of it, for people."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        problem = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is None:
        return f"job {job} is queued again"
    return f"job {job} could not be queued again ({problem}); submit it once more to go on"
