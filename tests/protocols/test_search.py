"""Test cross-modal search on tiny synthetic data sets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from assemble.stages.loggers import MetricsFile
from common.encoders.text import GRUEncoder
from common.protocols.search import CrossModalSearch
from common.training.callbacks import StepSeed
from common.training.data_module import ShardedDataModule
from tests.protocols.parts import (
    CLASSES,
    assert_same,
    checkpoint,
    copy_of,
    image_encoder,
    pictures,
    results_of,
    trainer,
)
from tests.stages import read_metrics


def words(width: int = 16) -> GRUEncoder:
    torch.manual_seed(3)
    return GRUEncoder(12, embedding_dim=8, hidden_size=width)


def words_of(image: int, which: int) -> dict[str, Tensor]:
    """Make a caption of the image's color and one or two other words. Some images have equal captions."""
    tokens = [1 + image % CLASSES, 4 + (image // 6 + which) % 8, 4 * (which % 2)]
    return {"tokens": torch.tensor(tokens), "lengths": torch.tensor(2 + which % 2)}


class Captioned(Dataset[dict[str, Tensor]]):
    """Pictures with one caption each for training, indexed by the keys of the epoch sampler."""

    def __init__(self, size: int) -> None:
        self.pictures = pictures(size)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, item = key
        return {**self.pictures[item], **words_of(item, epoch % 2), "image_index": torch.tensor(item)}


def captions(images: int) -> list[dict[str, Tensor]]:
    """Make two captions of every image."""

    def sample(item: int) -> dict[str, Tensor]:
        return {**words_of(item // 2, item % 2), "index": torch.tensor(item), "image_index": torch.tensor(item // 2)}

    return [sample(item) for item in range(2 * images)]


class SearchData(ShardedDataModule):
    """Twelve images to train on in three steps per epoch, eleven for selection, and ten to test on."""

    def __init__(self, train: int = 12, validation: int = 11, test: int = 10) -> None:
        super().__init__(batch_size=4, num_workers=0, seed=0)
        self.sizes = train, validation, test

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(Captioned(self.sizes[0]))

    def _pair(self, images: int, noise: int) -> list[DataLoader[Any]]:
        parts: dict[str, Any] = {"pictures": pictures(images, noise), "captions": captions(images)}
        return [self.evaluation_loader(part, 3, f"{images} {name}") for name, part in parts.items()]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._pair(self.sizes[1], 1)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._pair(self.sizes[2], 2)


def search(**options: Any) -> CrossModalSearch:
    return CrossModalSearch(
        image_encoder(), words(), **{"embedding_dim": 16, "learning_rate": 1e-2, "fold_size": None, **options}
    )


class Judged(pl.Callback):
    """Record the weights of the common space at every validation, and optionally replace the sum of recalls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sums: list[float] | None = None) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.steps: list[int] = []
        original = CrossModalSearch._search

        def search(module: CrossModalSearch, *args: Any, **options: Any) -> dict[str, Tensor]:
            metrics = original(module, *args, **options)
            if not module.trainer.testing:
                if sums is not None:
                    value = sums[len(self.weights)]
                    metrics = {name: torch.tensor(value / 6) for name in metrics}
                self.weights.append(copy_of(module.space))
                self.steps.append(module.global_step)
            return metrics

        monkeypatch.setattr(CrossModalSearch, "_search", search)


class TestCrossModalSearch:
    def test_learns(self, tmp_path: Path) -> None:
        module = search(
            pretrained=checkpoint(tmp_path / "pretrained.ckpt", encoder=image_encoder(7)),
            learning_rate=3e-2,
            milestones=[6],
        )
        before = results_of(trainer(tmp_path), module, SearchData())
        run = trainer(tmp_path, max_epochs=12, use_distributed_sampler=False)
        run.fit(module, datamodule=SearchData(train=24))
        assert_same(image_encoder(7).state_dict(), module.encoder)
        assert set(run.progress_bar_metrics) == {"train/loss"}
        metrics = results_of(run, module, SearchData())
        directions = [f"{d}_{name}" for d in ("i2t", "t2i") for name in ("r1", "r5", "r10", "medr", "meanr")]
        expected = {f"test/{name}{ending}" for name in directions for ending in ("", "_equal_text")}
        assert set(metrics) == expected | {"test/selected_epoch", "test/validation_recall_sum"}
        assert 1 <= metrics["test/selected_epoch"] <= 12
        assert metrics["test/t2i_r5"] > max(80, before["test/t2i_r5"])
        assert metrics["test/i2t_r1_equal_text"] > metrics["test/i2t_r1"]

    def test_the_weights_of_the_best_epoch_are_tested(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        judged = Judged(monkeypatch, [10.0, 30.0, 30.0, 20.0])
        module = search()
        run = trainer(tmp_path, max_epochs=4, use_distributed_sampler=False)
        run.fit(module, datamodule=SearchData())
        assert judged.steps == [3, 6, 9, 12]
        assert_same(judged.weights[1], module.space)
        path = tmp_path / "last.ckpt"
        run.save_checkpoint(path)
        fresh = search()
        run = trainer(tmp_path)
        run.test(fresh, datamodule=SearchData(), ckpt_path=path, verbose=False, weights_only=True)
        assert_same(judged.weights[1], fresh.space)
        assert run.callback_metrics["test/selected_epoch"] == 2
        assert run.callback_metrics["test/validation_recall_sum"] == pytest.approx(30)

    # An epoch has three steps. Checkpoint 3 is saved after the first epoch, before its validation; checkpoint 4 is
    # inside the second epoch; checkpoint 9 is saved after the last step.
    @pytest.mark.parametrize("step", [3, 4, 9])
    def test_a_resumed_run_selects_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        file = MetricsFile(tmp_path / "metrics.csv")

        def run(checkpoint: Path | None) -> tuple[CrossModalSearch, list[int], dict[str, set[tuple[int, float]]]]:
            with monkeypatch.context() as patch:
                judged, module = Judged(patch), search()
                save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
                callbacks = [StepSeed(0), *([save] if checkpoint is None else [])]
                options = {"callbacks": callbacks, "enable_checkpointing": True, "use_distributed_sampler": False}
                session = trainer(tmp_path, max_epochs=3, logger=file, log_every_n_steps=1, **options)
                session.fit(module, datamodule=SearchData(), ckpt_path=checkpoint, weights_only=True)
            curves = read_metrics(tmp_path / "metrics.csv")
            return module, judged.steps, {name: set(row) for name, row in curves.items()}

        whole, steps, curves = run(None)
        assert steps == [3, 6, 9]
        assert {at for at, _ in curves["val/recall_sum"]} == {3, 6, 8}
        file.drop_after(step - 1)
        resumed, steps, again = run(tmp_path / f"step={step}.ckpt")
        assert steps == [s for s in (3, 6, 9) if s >= step]
        assert again == curves
        assert_same(whole.state_dict(), resumed)
        assert whole.best.state() == resumed.best.state()

    def test_judging_leaves_modes_and_random_numbers_alone(self, tmp_path: Path) -> None:
        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
                assert pl_module.space.training
                assert not pl_module.encoder.training
                draws.append(torch.rand(()).item())

        results = []
        for validation in (4, 9):
            draws: list[float] = []
            torch.manual_seed(0)
            trainer(tmp_path, max_epochs=3, callbacks=[Watch()], use_distributed_sampler=False).fit(
                search(), datamodule=SearchData(validation=validation)
            )
            results.append(draws)
        assert results[0] == results[1]

    @pytest.mark.parametrize("hardest", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_captions_of_the_same_image_are_no_negatives(self, masked: bool, hardest: bool) -> None:
        samples = [Captioned(4)[epoch, item] for epoch, item in ((0, 0), (1, 0), (0, 1), (0, 2))]
        batch = torch.utils.data.default_collate(samples)
        module = search(hardest=hardest, mask_same_image=masked)
        # Glorot's initial weights are below the square root of 6 / (32 + 16).
        assert 0.9 < module.space.projection.weight.abs().max() * 8**0.5 < 1.001
        assert not module.space.projection.bias.any()
        with torch.no_grad():
            image = module.space.image(module.features(batch["image"]))
            text = module.space.text(batch["tokens"])
            scores, found = image @ text.T, module.training_step(batch, 0)
        assert torch.cat([image, text]).norm(dim=1).tolist() == pytest.approx([1.0] * 8)
        of_image, of_text = [], []
        for i in range(4):
            others = [j for j in range(4) if j != i and not (masked and {i, j} == {0, 1})]
            of_image.append([max(0.0, 0.2 - float(scores[i, i] - scores[i, j])) for j in others])
            of_text.append([max(0.0, 0.2 - float(scores[i, i] - scores[j, i])) for j in others])
        reduce: Callable[[list[float]], float] = max if hardest else sum
        expected = sum(map(reduce, of_image)) + sum(map(reduce, of_text))
        assert found.item() == pytest.approx(expected, rel=1e-5)
