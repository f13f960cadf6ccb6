"""Callbacks of every stage, and atomic checkpoints."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from common.encoders.checkpoint_files import require_intact
from common.errors import NonFiniteLossError, StageError
from common.files import write_whole
from common.types import NonNegativeInt, PositiveInt


class StepSeed(Callback):
    """Makes resumed runs exact: seeds the global generators from (seed, batch, rank) before each training batch."""

    def __init__(self, seed: NonNegativeInt = 0) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        counter = trainer.fit_loop.total_batch_idx
        digest = hashlib.blake2b(f"{self.seed}/{counter}/{trainer.global_rank}".encode(), digest_size=8).digest()
        value = int.from_bytes(digest, "little") >> 1
        torch.manual_seed(value)
        np.random.seed(value % 2**32)  # noqa: NPY002 - libraries still draw from the global generator
        random.seed(value)


class StopOnNonFiniteLoss(Callback):
    """Stops the run if the loss is not finite. Reports the step and the samples, and writes `non_finite.ckpt`.

    A check waits for the device, so checks only happen every `every_n_steps` steps and before a checkpoint. A single
    CPU process checks every step.
    """

    def __init__(self, directory: str, every_n_steps: PositiveInt = 50) -> None:
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self._first_bad: torch.Tensor | None = None
        self._recent: deque[tuple[int, torch.Tensor | None]] = deque(maxlen=every_n_steps)
        self._stops = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, torch.Tensor):
            return
        # Lightning may have divided the loss by accumulate_grad_batches, which doesn't change whether it is finite.
        step = trainer.fit_loop.total_batch_idx
        bad = ~torch.isfinite(loss.detach()).all()
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, device=loss.device)
        unset = self._first_bad < 0
        self._first_bad = torch.where(bad & unset, torch.full_like(self._first_bad, step), self._first_bad)
        index = batch.get("index", batch.get("image_index")) if isinstance(batch, dict) else None
        self._recent.append((step, index))
        alone_on_cpu = loss.device.type == "cpu" and trainer.world_size == 1
        if alone_on_cpu or (step + 1) % self.every_n_steps == 0:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._stops:
            self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        step = -1 if self._first_bad is None else int(self._first_bad)
        # All ranks stop together: saving is a collective, so one rank alone would wait forever.
        if not trainer.strategy.reduce_boolean_decision(step >= 0, all=False):
            return
        samples = next((index for at, index in self._recent if at == step), None)
        listed, look = "unknown", ""
        if samples is not None and len(samples):
            listed, look = ", ".join(map(str, samples.tolist()[:64])), ", or look at those samples"
        path = self.directory / "non_finite.ckpt"
        self._stops = True
        trainer.save_checkpoint(path)
        if step < 0:
            raise NonFiniteLossError(f"the loss is not finite on another rank, which lists the samples. See {path}")
        raise NonFiniteLossError(
            f"the loss is not finite at batch {step} (rank {trainer.global_rank}); samples of that batch: {listed}. "
            f"The state is saved in {path}; the last good checkpoint, if any, is next to it. Lower the learning "
            f"rate{look}."
        )


class CheckReplicas(Callback):
    """Checks periodically that ranks hold the same state, by calling `check_replicas(name)` of submodules."""

    def __init__(self, every_n_steps: PositiveInt = 1000) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size > 1 and trainer.global_step % self.every_n_steps == 0:
            for name, part in pl_module.named_modules():
                if check := getattr(part, "check_replicas", None):
                    check(name)


def listed(loaders: Any) -> Sequence[Any]:
    """Return one or several data loaders as a list. Lightning passes a single loader without a list."""
    return loaders if isinstance(loaders, list | tuple) else [loaders]


class SamplesForAll(Callback):
    """Fails early if a validation or test set has fewer samples than processes. Otherwise, the run would hang later."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if trainer.world_size == 1 or data is None:
            return
        for name in ("val", "test") if stage == "fit" else ("val",) if stage == "validate" else (stage,):
            validates = trainer.limit_val_batches and is_overridden("validation_step", pl_module)
            if not is_overridden(f"{name}_dataloader", data) or (name == "val" and not validates):
                continue
            for loader in listed(getattr(data, f"{name}_dataloader")()):
                if 0 < (count := len(loader.dataset)) < trainer.world_size:
                    what = {"val": "validation"}.get(name, name)
                    raise ValueError(
                        f"trainer.devices: the {what} set has {count} sample{'s' * (count > 1)}, fewer than the "
                        f"{trainer.world_size} processes (trainer.devices x trainer.num_nodes); use fewer devices"
                    )


class EpochCount(Callback):
    """Corrects the epoch count after resuming at the end of an epoch. Otherwise, the next resume trains too long."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        progress = trainer.fit_loop.epoch_progress
        current: Any = progress.current
        if current.ready == current.processed:
            progress.increment_ready()
            progress.increment_started()


class MissedCheckpoints(Callback):
    """Writes the permanent checkpoint of the step at which a run resumes, if missing. Other stages may need it.

    Also marks the step as saved. Otherwise, Lightning would save again after the first batch of an accumulated step.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop
        step, epoch = trainer.global_step, loop.epoch_progress.current.ready - 1
        if not step:
            return
        for kept in trainer.checkpoint_callbacks:
            if not isinstance(kept, ModelCheckpoint):
                continue
            kept._last_global_step_saved = step
            if kept.save_top_k != -1:
                continue
            every, epochs = kept._every_n_train_steps, kept._every_n_epochs
            ends = loop.epoch_loop.batch_progress.is_last_batch
            due = (every > 0 and step % every == 0) or (epochs > 0 and ends and (epoch + 1) % epochs == 0)
            path = kept.format_checkpoint_name({"step": torch.tensor(step), "epoch": torch.tensor(epoch)})
            if due and not trainer.strategy.broadcast(Path(path).is_file()):
                trainer.save_checkpoint(path, kept.save_weights_only)


class SpacedCheckpoints(Callback):
    """Skips a resume checkpoint if the last one is less than `minutes` old.

    Lightning runs checkpoint callbacks last, so this callback can decide before them. Ranks only communicate at
    multiples of `every_n_train_steps`.
    """

    def __init__(self, minutes: float, filename: str = "last") -> None:
        self.minutes, self.filename = minutes, filename
        self._saved = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.minutes:
            return
        step = trainer.global_step
        for resumed in trainer.checkpoint_callbacks:
            if not isinstance(resumed, ModelCheckpoint) or resumed.filename != self.filename:
                continue
            every, before = resumed._every_n_train_steps, resumed._last_global_step_saved
            # Decide once per step: the remaining parts of an accumulated step must not be saved.
            if every < 1 or step % every or before == step:
                continue
            now = time.monotonic()
            if trainer.strategy.broadcast(now - self._saved < 60 * self.minutes):
                resumed._last_global_step_saved = step  # makes Lightning skip it
            else:
                self._saved = now


class Sessions(Callback):
    """Keeps a stage's training time and code revisions in its checkpoints, across restarts.

    Args:
        resumed: called on rank 0 with the optimizer step and the batch number to resume at, which differ if a batch
            makes several updates.
    """

    def __init__(self, git: dict[str, Any], resumed: Callable[[int, int], None]) -> None:
        self.git = git
        self._resumed = resumed
        self._began = time.monotonic()
        self._earlier = 0.0

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning doesn't record that early stopping ended the training, so a resumed run would train on.
        checkpoint |= {"wall_seconds": self.seconds, "git": self.git, "stopped": trainer.should_stop}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # the test after training loads a checkpoint of this session
            return
        self._earlier, before = checkpoint["wall_seconds"], checkpoint["git"]
        trainer.should_stop = checkpoint.get("stopped", False)
        now, earlier = self.git, [*before.get("earlier", []), before["revision"]]
        dirty = before["dirty"] if now["dirty"] is False else now["dirty"]
        others = [revision for revision in dict.fromkeys(earlier) if revision != now["revision"]]
        self.git = {"revision": now["revision"], "dirty": dirty, **({"earlier": others} if others else {})}
        if trainer.is_global_zero:
            loop = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]
            self._resumed(checkpoint["global_step"], loop["_batches_that_stepped"])


class Progress(Callback):
    """Writes progress to a file every `every` seconds, which waits for the device. Deletes the file after training."""

    def __init__(self, path: Path, every: float = 1.0) -> None:
        self.path, self.every = path, every
        self._next = 0.0
        self._began: tuple[float, float] | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if not trainer.is_global_zero or now < self._next:
            return
        self._next = now + self.every
        step = trainer.fit_loop.total_batch_idx + 1
        share = self._share(trainer, step)
        began, at = self._began = self._began or (now, share)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        # Automatic optimization divides the loss by accumulate_grad_batches.
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        progress = {
            "step": trainer.global_step,
            "share": share,
            "loss": parts * float(loss.detach()) if isinstance(loss, torch.Tensor) else None,
            "left": (now - began) * (1 - share) / (share - at) if share > at else None,
        }
        # Progress is optional, and a full disk is reported when a checkpoint is written.
        with suppress(OSError):
            self.path.write_text(json.dumps(progress))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.unlink(missing_ok=True)

    @staticmethod
    def _share(trainer: pl.Trainer, step: int) -> float:
        shares = [0.0]
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            shares.append(step / (trainer.max_epochs * trainer.num_training_batches))
        return min(max(shares), 1.0)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically. Lightning would leave a partial file after a kill or on a full disk."""

    def __init__(self, module: str) -> None:
        self.module = module

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                torch.save({**checkpoint, "module": self.module}, file)

        try:
            write_whole(path, write)
        except RuntimeError as error:
            if not isinstance(cause := error.__context__, OSError):
                raise
            # torch.save hides the disk's error behind a RuntimeError.
            raise OSError(cause.errno, cause.strerror, str(path)) from error

    def load_checkpoint(self, path: str | Path, *options: Any, **named: Any) -> dict[str, Any]:
        try:
            require_intact(path)
            return super().load_checkpoint(path, *options, **named)
        except (PermissionError, MemoryError) as error:
            raise StageError(f"{path} cannot be read: {error}") from error
        except Exception as error:  # a damaged file can raise any error
            raise StageError(f"{path} is damaged ({error!s:.200}): delete it to restart the stage") from error


def batch_generator(module: pl.LightningModule, seed: int) -> torch.Generator:
    """Return a random generator that depends only on the seed and the number of the training batch."""
    return torch.Generator().manual_seed((seed << 32) + module.trainer.fit_loop.total_batch_idx)


def own_rows(module: pl.LightningModule, joint: Tensor) -> Tensor:
    """Return this rank's rows of a global batch (r, r + W, ... on rank r of W), on its device."""
    return joint[module.trainer.global_rank :: module.trainer.world_size].to(module.device, non_blocking=True)
