"""Test the callbacks of every stage without training: what they set, reject, write and store."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.progress import _Progress
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader

from common.errors import NonFiniteLossError
from common.training import callbacks
from common.training.selection import BestWeights

NO_MODULE: Any = None


class Sized(pl.LightningDataModule):
    """A data module with the given numbers of test and validation samples."""

    def __init__(self, test: int, validation: int = 9) -> None:
        super().__init__()
        self.sizes = {"test": test, "val": validation}

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(range(9)), DataLoader(range(self.sizes["test"]))]  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(self.sizes["val"]))  # type: ignore[arg-type]


class Validating(pl.LightningModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


@pytest.mark.parametrize(
    ("data", "stage", "limit", "told"),
    [
        (Sized(1), "fit", 1.0, "the test set has 1 sample, "),
        (Sized(2), "test", 1.0, "the test set has 2 samples, "),
        (Sized(3, 2), "fit", 1.0, "the validation set has 2 "),
        (Sized(3, 2), "validate", 1.0, "the validation set has 2 "),
        (Sized(2, 2), "fit", 0, "the test set has 2 "),
        (Sized(3, 2), "fit", 0, None),
        (Sized(3, 2), "test", 1.0, None),
        (Sized(3), "fit", 1.0, None),
        (Sized(0), "fit", 1.0, None),
        (Sized(2), "validate", 1.0, None),
        (pl.LightningDataModule(), "fit", 1.0, None),
        (None, "fit", 1.0, None),
    ],
)
def test_a_process_without_a_sample_is_told_before_training(
    data: Any, stage: str, limit: float, told: str | None
) -> None:
    trainer: Any = SimpleNamespace(world_size=3, datamodule=data, limit_val_batches=limit)
    if told is None:
        callbacks.SamplesForAll().setup(trainer, Validating(), stage)
    else:
        with pytest.raises(ValueError, match=rf"^trainer\.devices: {told}"):
            callbacks.SamplesForAll().setup(trainer, Validating(), stage)
    callbacks.SamplesForAll().setup(trainer, pl.LightningModule(), "validate")
    trainer.world_size = 1
    callbacks.SamplesForAll().setup(trainer, Validating(), stage)


def test_every_generator_is_seeded_by_step_and_rank_as_in_every_release() -> None:
    trainer: Any = SimpleNamespace(global_rank=1, fit_loop=SimpleNamespace(total_batch_idx=8))
    callbacks.StepSeed(3).on_train_batch_start(trainer, NO_MODULE, None, 0)
    seed = 7156567794394262752
    assert torch.initial_seed() == seed
    assert random.random() == random.Random(seed).random()
    assert np.random.rand() == np.random.RandomState(seed % 2**32).rand()  # noqa: NPY002


class TestLosses:
    """Check the loss at each step on a CPU, or with two processes only at every fourth step."""

    def stop(self, folder: Path, world_size: int = 2, other: bool = False) -> tuple[callbacks.StopOnNonFiniteLoss, Any]:
        stop = callbacks.StopOnNonFiniteLoss(str(folder), every_n_steps=4)
        trainer: Any = SimpleNamespace(world_size=world_size, global_rank=0, fit_loop=SimpleNamespace(), saved=[])

        def save(path: Path) -> None:
            stop.on_save_checkpoint(trainer, NO_MODULE, {})
            trainer.saved.append(path.name)

        def together(own: bool, all: bool = True) -> bool:
            return (own and other) if all else (own or other)

        trainer.save_checkpoint, trainer.strategy = save, SimpleNamespace(reduce_boolean_decision=together)
        return stop, trainer

    def step(
        self, stop: callbacks.StopOnNonFiniteLoss, trainer: Any, number: int, loss: Any, batch: Any = None
    ) -> None:
        trainer.fit_loop.total_batch_idx = number
        stop.on_train_batch_end(trainer, NO_MODULE, loss, batch, number)

    @pytest.mark.parametrize(("world_size", "told_at"), [(1, 1), (2, 3)])
    def test_the_first_bad_step_and_its_samples_are_named(self, tmp_path: Path, world_size: int, told_at: int) -> None:
        bad, good = torch.tensor(float("nan")), torch.tensor(1.0)
        stop, trainer = self.stop(tmp_path, world_size)
        for nothing in (None, {}):
            self.step(stop, trainer, 0, nothing)
        for number in range(1, told_at):
            self.step(stop, trainer, number, bad, {"index": torch.arange(70)})
        with pytest.raises(NonFiniteLossError, match=r"at batch 1 \(rank 0\).*batch: 0, 1, .* 63\. .*, or look at"):
            self.step(stop, trainer, told_at, {"loss": good if told_at > 1 else bad}, {"image_index": torch.arange(70)})
        assert trainer.saved == ["non_finite.ckpt"]

    def test_no_checkpoint_is_written_over_the_last_good_one(self, tmp_path: Path) -> None:
        stop, trainer = self.stop(tmp_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        self.step(stop, trainer, 3, torch.tensor(1.0))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        self.step(stop, trainer, 0, torch.tensor(float("inf")), [torch.tensor(5)])
        with pytest.raises(NonFiniteLossError, match=r"at batch 0 .*samples of that batch: unknown\..*rate\.$"):
            trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert trainer.saved == ["last.ckpt", "last.ckpt", "non_finite.ckpt"]
        stop, trainer = self.stop(tmp_path, other=True)  # if one process stops, all stop
        with pytest.raises(NonFiniteLossError, match="another rank"):
            stop.on_train_epoch_end(trainer, NO_MODULE)


def test_replicas_are_compared_now_and_then() -> None:
    class Replicated(nn.Module):
        def check_replicas(self, name: str) -> None:
            checked.append(name)

    checked: list[str] = []
    module: Any = nn.Sequential(nn.ReLU(), Replicated())
    for world_size, step in ((2, 6), (2, 7), (1, 6)):
        trainer: Any = SimpleNamespace(world_size=world_size, global_step=step)
        callbacks.CheckReplicas(every_n_steps=3).on_train_batch_end(trainer, module, None, None, 0)
    assert checked == ["1"]


@pytest.mark.parametrize("processed", [1, 0])
def test_an_epoch_begins_after_one_that_was_processed(processed: int) -> None:
    progress = _Progress()
    progress.current.ready, progress.current.processed = 1, processed
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_progress=progress))
    callbacks.EpochCount().on_train_batch_start(trainer, NO_MODULE, None, 0)
    assert (progress.current.ready, progress.current.started) == (1 + processed, processed)


@pytest.mark.parametrize(
    ("steps", "epochs", "step", "name"),
    [
        (3, 0, 6, "epoch=1-step=6.ckpt"),
        (1, 0, 7, "epoch=1-step=7.ckpt"),
        (0, 1, 4, "epoch=0-step=4.ckpt"),
        (0, 2, 8, "epoch=1-step=8.ckpt"),
        *((*never, None) for never in ((3, 0, 0), (3, 0, 7), (3, 0, 8), (0, 2, 4), (0, 2, 7))),
    ],
)
def test_a_missed_checkpoint_is_written(tmp_path: Path, steps: int, epochs: int, step: int, name: str | None) -> None:
    """Resume a run with four batches per epoch at a step whose permanent checkpoint is missing."""
    given: dict[str, Any] = {"dirpath": tmp_path, "every_n_train_steps": steps, "every_n_epochs": epochs}
    kept = ModelCheckpoint(**given, filename="{epoch}-{step}", save_top_k=-1, save_weights_only=True)
    epoch, batch = divmod(step - 1, 4)
    loop = SimpleNamespace(
        epoch_progress=SimpleNamespace(current=SimpleNamespace(ready=epoch + 1)),
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=batch == 3)),
    )
    saved: list[Any] = []
    run: Any = SimpleNamespace(global_step=step, fit_loop=loop, strategy=SimpleNamespace(broadcast=bool))
    run.checkpoint_callbacks = [pl.Callback(), ModelCheckpoint(**given, filename="last"), kept]
    run.save_checkpoint = lambda *arguments: saved.append(arguments)
    for _ in range(2):
        callbacks.MissedCheckpoints().on_train_start(run, NO_MODULE)
        assert saved == ([] if name is None else [(str(tmp_path / name), True)])
        (tmp_path / str(name)).touch()  # must not be written again


def saved_steps(directory: Path, minutes: float, monkeypatch: pytest.MonkeyPatch, **answers: Any) -> list[int]:
    """Train 13 steps of one minute each. Return the steps at which the checkpoint for resuming is saved."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: clock.now))
    saved: list[int] = []

    class Tick(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.now += 20

    model = BoringModel()
    last = ModelCheckpoint(directory, "last", every_n_train_steps=2, enable_version_counter=False)
    kept = ModelCheckpoint(directory, "{step}", every_n_train_steps=5, save_top_k=-1, enable_version_counter=False)
    spaced = callbacks.SpacedCheckpoints(minutes)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=13, accumulate_grad_batches=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[last, kept, Tick(), spaced],
    )  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(trainer.strategy, name, answer)
    save = trainer.save_checkpoint

    def noting(path: Any, *arguments: Any) -> None:
        saved.extend([trainer.global_step] * (Path(path).name == "last.ckpt"))
        assert not trainer.fit_loop._should_accumulate()  # a step is never interrupted
        save(path, *arguments)

    monkeypatch.setattr(trainer, "save_checkpoint", noting)
    trainer.fit(model)
    assert len(list(directory.glob("step=*.ckpt"))) == 2  # other stages' checkpoints are all kept
    return saved


def test_checkpoints_to_resume_from_are_minutes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved_steps(tmp_path / "0", 0, monkeypatch) == [2, 4, 6, 8, 10, 12]
    assert saved_steps(tmp_path / "5", 5, monkeypatch) == [6, 12]
    # Rank 0 decides for all ranks. It is asked once at each multiple of the interval.
    asked: list[bool] = []

    def answer(early: Any) -> Any:
        if not isinstance(early, bool):
            return early
        asked.append(early)
        return len(asked) != 2

    assert saved_steps(tmp_path / "rank", 5, monkeypatch, broadcast=answer) == [4]
    assert asked == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("before", "now", "merged"),
    [
        ({"revision": "a", "dirty": False}, ("a", False), {"revision": "a", "dirty": False}),
        ({"revision": "a", "dirty": True}, ("b", False), {"revision": "b", "dirty": True, "earlier": ["a"]}),
        (
            {"revision": "a", "dirty": False, "earlier": ["z", "b"]},
            ("b", None),
            {"revision": "b", "dirty": None, "earlier": ["z", "a"]},
        ),
    ],
)
def test_time_and_revisions_are_added_up(before: Any, now: Any, merged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 0.5)
    monkeypatch.setattr(callbacks, "time", clock)
    resumed: list[tuple[int, int]] = []
    sessions = callbacks.Sessions({"revision": now[0], "dirty": now[1]}, lambda *at: resumed.append(at))
    loops = {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": 8}}}
    checkpoint: dict[str, Any] = {"wall_seconds": 100.0, "git": before, "global_step": 16, "loops": loops}
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.TESTING), is_global_zero=True)
    clock.monotonic = lambda: 3.0
    sessions.on_load_checkpoint(trainer, NO_MODULE, checkpoint)
    assert sessions.seconds == 2.5
    trainer.state.fn = TrainerFn.FITTING
    sessions.on_load_checkpoint(trainer, NO_MODULE, checkpoint)
    sessions.on_save_checkpoint(trainer, NO_MODULE, checkpoint)
    assert (checkpoint["wall_seconds"], checkpoint["git"], resumed) == (102.5, merged, [(16, 8)])
    trainer.is_global_zero = False
    sessions.on_load_checkpoint(trainer, NO_MODULE, checkpoint)
    assert len(resumed) == 1


@pytest.mark.parametrize(
    ("steps", "epochs", "batch", "share"),
    [
        (20, 2, 6, 0.7), (20, -1, 6, 0.7), (20, None, 6, 0.7), (-1, 2, 6, 0.35), (-1, 1, 4, 0.5), (1, -1, 0, 1.0),
        (-1, 2, 29, 1.0), (-1, -1, 6, 0.0), (0, 2, 0, 0.05),
    ],
)  # fmt: skip
def test_the_share_of_a_training(steps: int, epochs: int | None, batch: int, share: float) -> None:
    trainer: Any = SimpleNamespace(max_steps=steps, max_epochs=epochs, num_training_batches=10)
    trainer.global_step = 2 * (batch + 1)  # each batch has two optimizer steps
    assert callbacks.Progress._share(trainer, batch + 1) == share


def test_the_best_weights_are_kept_and_the_first_win_a_tie() -> None:
    module, logger, network = Mock(), Mock(), nn.Linear(1, 1, bias=False)
    best, module.loggers = BestWeights(network, "r1", "epoch"), [logger]
    assert best.metrics() == {}
    for done, score in ((2, 0.5), (4, 0.75), (4, 9.0), (6, 0.75)):
        nn.init.constant_(network.weight, done)
        best.compare(module, lambda score=score: {"r1": score}, done, done // 2, at_end=done == 6)
    assert module.mock_calls == [call.eval(), call.train()] * 3
    assert logger.log_metrics.mock_calls == [call({"val/r1": s}, at) for s, at in ((0.5, 2), (0.75, 4), (0.75, 5))]
    assert best.metrics() == {"selected_epoch": 2.0, "validation_r1": 0.75}
    best.restore()
    assert (network.weight.item(), best.weights) == (4.0, None)
