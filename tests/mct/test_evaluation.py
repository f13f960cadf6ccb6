"""Downstream protocols on tiny synthetic sets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from common.data.text import text_numbers
from common.encoders.image import ImageResNet
from common.encoders.text import GRUEncoder
from common.errors import NonFiniteLossError
from common.losses.margin import in_batch_hinge
from common.metrics.average_precision import average_precision
from common.metrics.linear_svm import judge_class
from common.stages.loggers import MetricsFile
from common.training.callbacks import StepSeed, StopOnNonFiniteLoss
from common.training.data_module import ShardedDataModule
from papers.mct import evaluation
from papers.mct.evaluation import (
    CrossModalSearch,
    LinearClassification,
    MultiLabelSVM,
    MultiLabelTagging,
    SupervisedClassification,
)
from papers.mct.weights import CheckpointError
from tests.stages import read_metrics

CLASSES = 3


class Pictures(Dataset[dict[str, Tensor]]):
    """Pictures whose class is a colour channel; ``tags`` gives several labels instead, one for every channel."""

    def __init__(self, size: int, noise: int = 0, tags: bool = False) -> None:
        self.size, self.noise, self.tags = size, noise, tags

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1000 * self.noise + item)
        image = 0.2 * torch.randn(3, 8, 8, generator=draw)
        label = item % CLASSES
        present = torch.tensor([(item >> channel) & 1 for channel in range(CLASSES)], dtype=torch.int8)
        image += 1.5 * (present if self.tags else torch.eye(CLASSES)[label])[:, None, None]
        sample = {"image": image, "index": torch.tensor(item)}
        return sample | ({"labels": present} if self.tags else {"label": torch.tensor(label)})


class Relabelled(Dataset[dict[str, Tensor]]):
    """Pictures with other labels."""

    def __init__(self, pictures: Dataset[dict[str, Tensor]], labels: Tensor) -> None:
        self.pictures, self.labels = pictures, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {**self.pictures[item], "labels": self.labels[item]}


class Given(Dataset[dict[str, Tensor]]):
    """Features in the place of images."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {"image": self.features[item], "label": self.labels[item], "index": torch.tensor(item)}


def encoder(seed: int = 0) -> ImageResNet:
    torch.manual_seed(seed)
    return ImageResNet(
        (1, 1, 1, 1), bottleneck=False, channels=(8, 8, 16, 32), stem_channels=8, stem_kernel=3, stem_pool=False
    )


def no_encoder(width: int) -> nn.Module:
    module = nn.Identity()
    module.feature_dim = width  # type: ignore[assignment]
    return module


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        }
    )


def results_of(run: pl.Trainer, module: pl.LightningModule, loaders: Any) -> dict[str, float]:
    """All metrics of a test."""
    data = {"datamodule": loaders} if isinstance(loaders, pl.LightningDataModule) else {"dataloaders": loaders}
    run.test(module, **data, verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("test/")}


def loader(dataset: Dataset[dict[str, Tensor]], batch: int = 4, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(dataset, batch_size=batch, shuffle=shuffle, generator=torch.Generator().manual_seed(0))


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(state: dict[str, Tensor], module: nn.Module) -> None:
    for key, value in module.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Loading gives an encoder the weights of ``encoder(7)``; the list collects the fields it was asked for."""
    fields: list[str] = []

    def load(image_encoder: nn.Module, path: str, field: str = "pretrained") -> None:
        fields.append(field)
        image_encoder.load_state_dict(encoder(7).state_dict())

    monkeypatch.setattr(evaluation, "load_into_encoder", load)
    return fields


class Rates(pl.Callback):
    """Keeps the learning rates of every step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class Meddler(pl.Callback):
    """Puts the encoder into training mode, where its batch normalisation drifts."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        pl_module.image_encoder.train()


class TestLinearClassification:
    def fitted(self, tmp_path: Path, rates: list[float], **options: Any) -> LinearClassification:
        module = LinearClassification(encoder(), CLASSES, learning_rates=rates, milestones=[2])
        for classifier in module.classifiers:
            nn.init.zeros_(classifier.weight)
        trainer(tmp_path, max_epochs=3, **options).fit(module, loader(Pictures(12)))
        return module

    def test_classifiers_do_not_notice_each_other(self, tmp_path: Path) -> None:
        together = self.fitted(tmp_path, [0.3, 3.0])
        for position, rate in enumerate((0.3, 3.0)):
            alone = self.fitted(tmp_path, [rate])
            torch.testing.assert_close(alone.classifiers[0].weight, together.classifiers[position].weight)

    @pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1e3}])
    def test_a_rate_that_diverges_leaves_the_others_alone_and_is_not_chosen(
        self, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        stop = StopOnNonFiniteLoss(str(tmp_path))
        module = self.fitted(tmp_path, [3e38, 0.3], callbacks=[stop], **options)
        assert module.classifiers[0].weight.abs().max() > 1e37
        alone = self.fitted(tmp_path, [0.3], **options)
        torch.testing.assert_close(alone.classifiers[0].weight, module.classifiers[1].weight)
        # It is not chosen even where no other is right about anything.
        nn.init.constant_(module.classifiers[1].bias, torch.finfo().min / 10)
        nn.init.zeros_(module.classifiers[1].weight)
        metrics = results_of(trainer(tmp_path), module, [loader(Pictures(5)), loader(Pictures(6))])
        assert metrics["test/learning_rate"] == pytest.approx(0.3)
        assert metrics["test/top1"] == metrics["test/validation_top1_lr_0.3"] == 0

    def test_if_all_diverge_the_run_stops(self, tmp_path: Path) -> None:
        with pytest.raises(NonFiniteLossError):
            self.fitted(tmp_path, [3e38], callbacks=[StopOnNonFiniteLoss(str(tmp_path))])
        module = LinearClassification(encoder(), CLASSES)
        nn.init.constant_(module.image_encoder.conv1.weight, torch.nan)
        run = trainer(tmp_path, max_epochs=1, callbacks=[StopOnNonFiniteLoss(str(tmp_path))])
        with pytest.raises(NonFiniteLossError):
            run.fit(module, loader(Pictures(4)))
        module = LinearClassification(encoder(), CLASSES, learning_rates=[1.0, 2.0])
        for classifier in module.classifiers:
            nn.init.constant_(classifier.weight, torch.nan)
        with pytest.raises(ValueError, match=r"learning_rates: training diverged with each of 1, 2"):
            results_of(trainer(tmp_path), module, [loader(Pictures(4)), loader(Pictures(4))])

    def test_held_out_images_choose_and_test_images_judge(self, tmp_path: Path) -> None:
        module = LinearClassification(no_encoder(6), 6, learning_rates=[0.3, 3, 30])
        for shift, classifier in enumerate(module.classifiers):
            with torch.no_grad():
                classifier.weight.copy_(torch.eye(6).roll(shift, 0))
        features, labels = torch.eye(6), torch.arange(6)
        # Rate 3 (shifted by one) is right about the held-out labels; in the test it is right about one in six.
        test_labels = torch.where(labels == 0, 1, labels)
        held_out, test = Given(features, (labels + 1) % 6), Given(features, test_labels)
        metrics = results_of(trainer(tmp_path), module, [loader(held_out), loader(test)])
        assert metrics == pytest.approx(
            {
                "test/top1": 100 / 6,
                "test/top5": 100 / 6,  # the five other classes tie, which is not rewarded
                "test/learning_rate": 3,
                "test/images": 6,
                "test/validation_images": 6,
                "test/top1_lr_0.3": 500 / 6,
                "test/top1_lr_3": 100 / 6,
                "test/top1_lr_30": 0,
                "test/validation_top1_lr_0.3": 0,
                "test/validation_top1_lr_3": 100,
                "test/validation_top1_lr_30": 0,
            }
        )

    def test_of_equally_good_rates_the_first_is_chosen(self, tmp_path: Path) -> None:
        module = LinearClassification(no_encoder(2), 2, learning_rates=[3, 0.3])
        for classifier in module.classifiers:
            nn.init.eye_(classifier.weight)
        given = loader(Given(torch.eye(2), torch.arange(2)))
        assert results_of(trainer(tmp_path), module, [given, given])["test/learning_rate"] == 3

    def test_learns_with_the_encoder_as_it_was_loaded(self, tmp_path: Path, loaded: list[str]) -> None:
        module = LinearClassification(encoder(), CLASSES, "some.ckpt", learning_rates=[0.03, 0.3, 3], milestones=[15])
        run = trainer(tmp_path, max_epochs=20)
        run.fit(module, loader(Pictures(24), 8, shuffle=True))
        assert loaded == ["model.pretrained"]
        assert_same(encoder(7).state_dict(), module.image_encoder)
        held_out, test = Pictures(9, noise=1), Pictures(13, noise=2)
        metrics = results_of(run, module, [loader(held_out), loader(test)])
        assert loaded == ["model.pretrained"]  # not once more, for then the weights come from the checkpoint
        assert metrics["test/top1"] > 80
        assert metrics["test/top5"] == 100
        repeated = [loader(Subset(part, [0, 0, *range(len(part)), 3])) for part in (held_out, test)]
        assert results_of(run, module, repeated) == pytest.approx(metrics)

    @pytest.mark.parametrize("pretrained", [None, "some.ckpt"])
    def test_a_changed_encoder_is_an_error(self, tmp_path: Path, loaded: list[str], pretrained: str | None) -> None:
        module = LinearClassification(encoder(), CLASSES, pretrained)
        with pytest.raises(
            RuntimeError, match=r"\d+ tensors of a frozen encoder changed.*image_encoder.bn1\.running_mean"
        ):
            trainer(tmp_path, max_epochs=1, callbacks=[Meddler()]).fit(module, loader(Pictures(8)))

    def test_a_resumed_run_notices_an_encoder_that_had_drifted_before(self, tmp_path: Path, loaded: list[str]) -> None:
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        module = LinearClassification(encoder(), CLASSES, "some.ckpt")
        with pytest.raises(RuntimeError, match="changed"):
            trainer(tmp_path, max_epochs=1, callbacks=[Meddler(), save], enable_checkpointing=True).fit(
                module, loader(Pictures(8))
            )
        resumed = LinearClassification(encoder(), CLASSES, "some.ckpt")
        with pytest.raises(RuntimeError, match="changed"):
            trainer(tmp_path, max_epochs=1).fit(
                resumed, loader(Pictures(8)), ckpt_path=tmp_path / "step=1.ckpt", weights_only=True
            )

    def test_schedules(self, tmp_path: Path) -> None:
        for schedule, expected in (
            ("steps", [1, 1, 0.1, 0.1, 0.01, 0.01]),
            ("cosine", [0.5 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]),
        ):
            record = Rates()
            module = LinearClassification(
                encoder(), CLASSES, learning_rates=[0.3, 30], schedule=schedule, milestones=[1, 2]
            )
            trainer(tmp_path, max_epochs=3, callbacks=[record]).fit(module, loader(Pictures(8)))
            np.testing.assert_allclose(record.rates, np.outer(expected, [0.3, 30]), atol=1e-12)

    def test_normalised_features(self) -> None:
        images = 5 * torch.rand(64, 4)
        for kind, width in (("l2", 1.0), ("batch_norm", 2.0)):
            module = LinearClassification(no_encoder(4), 4, learning_rates=[1], normalise_features=kind)
            nn.init.eye_(module.classifiers[0].weight)
            with torch.no_grad():
                logits = module(images)[0]
            assert logits.norm(dim=1).square().mean().sqrt().item() == pytest.approx(width, rel=0.01)
        assert not list(module.norm.parameters())

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_runs_in_bfloat16(self, tmp_path: Path, precision: Any) -> None:
        module = LinearClassification(encoder(), CLASSES, learning_rates=[0.1])
        run = trainer(tmp_path, max_epochs=2, precision=precision)
        run.fit(module, loader(Pictures(8)))
        metrics = results_of(run, module, [loader(Pictures(4)), loader(Pictures(4))])
        assert 0 <= metrics["test/top1"] <= 100

    def test_mistakes_name_the_field(self, tmp_path: Path) -> None:
        for rates in ([], [0.3, 0.3], [0.0], [-1, 1]):
            with pytest.raises(ValueError, match="learning_rates"):
                LinearClassification(encoder(), CLASSES, learning_rates=rates)
        module = LinearClassification(encoder(), CLASSES)
        with pytest.raises(ValueError, match="test_dataloaders: LinearClassification needs two"):
            results_of(trainer(tmp_path), module, loader(Pictures(4)))
        with pytest.raises(ValueError, match=r"test_dataloaders: .*hold out"):
            results_of(trainer(tmp_path), module, [loader(Pictures(0)), loader(Pictures(4))])

        class Data(pl.LightningDataModule):
            num_classes = 1000

            def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
                return loader(Pictures(4))

        for wrong in (module, SupervisedClassification(encoder(), CLASSES), MultiLabelTagging(encoder(), CLASSES)):
            with pytest.raises(ValueError, match="num_classes: the model has 3, but the data have 1000"):
                trainer(tmp_path, max_epochs=1).fit(wrong, datamodule=Data())


class TestSupervisedClassification:
    def test_the_whole_network_learns(self, tmp_path: Path, loaded: list[str]) -> None:
        record = Rates()
        module = SupervisedClassification(encoder(), CLASSES, learning_rate=0.05, milestones=[10])
        start = copy_of(module)
        run = trainer(tmp_path, max_epochs=12, callbacks=[record])
        run.fit(module, loader(Pictures(24), 8, shuffle=True))
        assert loaded == []
        assert [rates[0] for rates in record.rates] == pytest.approx([0.05] * 30 + [0.005] * 6)
        assert not torch.equal(start["image_encoder.conv1.weight"], module.image_encoder.conv1.weight)
        assert not torch.equal(start["image_encoder.bn1.running_mean"], module.image_encoder.bn1.running_mean)
        assert {name.split(".")[0] for name in module.state_dict()} == {"image_encoder", "classifier"}
        last = copy_of(module)
        metrics = results_of(run, module, loader(Pictures(13, noise=1)))
        assert_same(last, module)
        assert set(metrics) == {"test/top1", "test/top5", "test/images"}
        assert metrics["test/images"] == 13
        assert metrics["test/top1"] > 80

    def test_starts_from_a_checkpoint_when_asked(self, tmp_path: Path, loaded: list[str]) -> None:
        module = SupervisedClassification(encoder(), CLASSES, pretrained="some.ckpt", learning_rate=1e-9)
        trainer(tmp_path, max_epochs=1).fit(module, loader(Pictures(4)))
        assert loaded == ["model.pretrained"]
        torch.testing.assert_close(module.image_encoder.conv1.weight, encoder(7).conv1.weight)

    def test_others_start_from_its_checkpoint(self, tmp_path: Path) -> None:
        module = SupervisedClassification(encoder(7), CLASSES)
        run = trainer(tmp_path, max_epochs=1)
        run.fit(module, loader(Pictures(8)))
        path = tmp_path / "supervised.ckpt"
        run.save_checkpoint(path)
        for probe in (
            LinearClassification(encoder(), CLASSES, str(path)),
            MultiLabelTagging(encoder(), CLASSES, str(path)),
        ):
            trainer(tmp_path, max_epochs=1).fit(probe, loader(Pictures(4, tags=isinstance(probe, MultiLabelTagging))))
            assert_same(module.image_encoder.state_dict(), probe.image_encoder)
        with pytest.raises(CheckpointError, match=r"^model.pretrained: .*nowhere\.ckpt"):
            results_of(trainer(tmp_path), MultiLabelSVM(encoder(), "nowhere.ckpt"), [loader(Pictures(4, tags=True))])


def average_precisions_of(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "media" / "average_precision.json").read_text(encoding="utf-8"))


class TestMultiLabelSVM:
    @pytest.mark.parametrize("pool", [1, 2])
    def test_equals_the_protocol_written_plainly(self, tmp_path: Path, loaded: list[str], pool: Any) -> None:
        labels = torch.stack([Pictures(40, tags=True)[item]["labels"] for item in range(40)])
        labels[::7, 0] = -1
        train = Relabelled(Pictures(40, 1, tags=True), labels)
        test = Relabelled(Pictures(23, 2, tags=True), labels[:23])
        module = MultiLabelSVM(encoder(), "some.ckpt", pool=pool, costs=[0.1, 1])
        metrics = results_of(trainer(tmp_path), module, [loader(train, 7), loader(test, 5)])
        assert loaded == ["model.pretrained"]

        def features(part: Relabelled) -> np.ndarray:
            with torch.no_grad():
                maps = encoder(7).eval().forward_map(torch.stack([item["image"] for item in part]))
                rows = nn.functional.adaptive_avg_pool2d(maps, pool).flatten(1)
            return nn.functional.normalize(rows).numpy()

        verdicts = [
            judge_class(
                features(train), train.labels.numpy()[:, c], features(test), test.labels.numpy()[:, c], [0.1, 1]
            )
            for c in range(CLASSES)
        ]
        average = [100 * verdict.average_precision for verdict in verdicts]
        assert metrics["test/map"] == pytest.approx(np.mean(average), abs=1e-3)
        assert metrics["test/classes"] == CLASSES
        assert metrics["test/images"] == 23
        for cost in (0.1, 1):
            chosen = sum(verdict.cost == cost for verdict in verdicts)
            assert metrics[f"test/classes_with_C_{cost}"] == chosen
        listed = average_precisions_of(tmp_path)
        assert [entry["average_precision"] for entry in listed] == pytest.approx(average, abs=1e-3)
        assert [entry["C"] for entry in listed] == [verdict.cost for verdict in verdicts]

    def test_order_and_repeated_images_change_nothing(self, tmp_path: Path) -> None:
        parts = Pictures(24, 1, tags=True), Pictures(24, 2, tags=True)
        module = MultiLabelSVM(encoder())
        once = results_of(trainer(tmp_path), module, [loader(part) for part in parts])
        order = [*torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist(), 3, 3, 17]
        repeated = results_of(trainer(tmp_path), module, [loader(Subset(part, order), 5) for part in parts])
        assert repeated == pytest.approx(once, abs=1e-3)
        assert once["test/map"] > 70

    def test_classes_that_cannot_be_judged_are_left_out_and_named(self, tmp_path: Path) -> None:
        labels = torch.stack([Pictures(24, tags=True)[item]["labels"] for item in range(24)])
        train, test = labels.clone(), labels.clone()
        train[:, 0] = 0  # never seen in training
        test[:, 1] = torch.where(test[:, 1] == 1, -1, 0)  # only difficult ones in the test
        loaders = [loader(Relabelled(Pictures(24, n, tags=True), part)) for n, part in enumerate((train, test))]

        class Data(pl.LightningDataModule):
            class_names = ("cat", "dog", "cow")

            def test_dataloader(self) -> Any:
                return loaders

        module = MultiLabelSVM(encoder())
        with pytest.warns(
            UserWarning, match=r"2 of 3 classes are left out of the mean \(cat: 0 positive and 24.*dog: "
        ):
            metrics = results_of(trainer(tmp_path), module, Data())
        assert metrics["test/classes"] == 1
        listed = average_precisions_of(tmp_path)
        assert [entry["class"] for entry in listed] == ["cat", "dog", "cow"]
        assert [entry["average_precision"] for entry in listed] == [None, None, pytest.approx(metrics["test/map"])]
        assert listed[1]["left_out"] == "no positive test sample"
        assert listed[1]["C"] is None

    def test_mistakes(self, tmp_path: Path) -> None:
        module = MultiLabelSVM(encoder())
        part = Pictures(12, tags=True)
        with pytest.raises(ValueError, match="test_dataloaders: MultiLabelSVM needs two"):
            results_of(trainer(tmp_path), module, [loader(part)])
        narrow = Relabelled(part, torch.zeros(12, 2, dtype=torch.int8))
        with pytest.raises(ValueError, match="labels: 3 classes in training, but 2 in the test"):
            results_of(trainer(tmp_path), module, [loader(part), loader(narrow)])
        empty = Relabelled(part, torch.zeros(12, 3, dtype=torch.int8))
        with pytest.raises(ValueError, match="labels: no class can be judged"):
            results_of(trainer(tmp_path), module, [loader(empty), loader(empty)])
        nn.init.constant_(module.image_encoder.conv1.weight, torch.nan)
        with pytest.raises(ValueError, match="features: some are not finite"):
            results_of(trainer(tmp_path), module, [loader(part), loader(part)])


class TestMultiLabelTagging:
    def test_learns_and_reports_the_mean_average_precision(self, tmp_path: Path, loaded: list[str]) -> None:
        module = MultiLabelTagging(encoder(), CLASSES, "some.ckpt", learning_rate=0.3, milestones=[15])
        run = trainer(tmp_path, max_epochs=20)
        run.fit(module, loader(Pictures(24, tags=True), 8, shuffle=True))
        assert loaded == ["model.pretrained"]
        assert_same(encoder(7).state_dict(), module.image_encoder)
        test = Pictures(21, 1, tags=True)
        metrics = results_of(run, module, loader(Subset(test, [0, 0, *range(21), 5])))
        samples = [test[item] for item in range(21)]
        labels = torch.stack([sample["labels"] for sample in samples]).numpy()
        with torch.no_grad():
            scores = module.eval()(torch.stack([sample["image"] for sample in samples])).numpy()
        average = [100 * average_precision(scores[:, c], labels[:, c]) for c in range(CLASSES)]
        assert metrics == pytest.approx({"test/map": np.mean(average), "test/classes": 3, "test/images": 21}, abs=1e-3)
        assert metrics["test/map"] > 80
        assert [entry["average_precision"] for entry in average_precisions_of(tmp_path)] == pytest.approx(average)

    def test_difficult_entries_teach_nothing(self) -> None:
        module = MultiLabelTagging(no_encoder(4), 2)
        images, labels = torch.randn(3, 4), torch.tensor([[1, -1], [0, -1], [-1, -1]], dtype=torch.int8)
        loss = module.training_step({"image": images, "labels": labels, "index": torch.arange(3)}, 0)
        loss.backward()
        assert module.classifier.weight.grad is not None
        assert module.classifier.weight.grad[0].abs().sum() > 0
        assert module.classifier.weight.grad[1].abs().sum() == 0
        with torch.no_grad():
            scores = module(images)[:2, 0]
        expected = nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor([1.0, 0.0]), reduction="sum") / 3
        assert loss.item() == pytest.approx(expected.item())

    def test_a_tag_without_test_images_is_left_out(self, tmp_path: Path) -> None:
        labels = torch.stack([Pictures(12, tags=True)[item]["labels"] for item in range(12)])
        labels[:, 2] = 0
        module = MultiLabelTagging(encoder(), CLASSES)
        with pytest.warns(UserWarning, match=r"1 of 3 classes are left out of the mean \(2: no positive"):
            metrics = results_of(trainer(tmp_path), module, loader(Relabelled(Pictures(12), labels)))
        assert metrics["test/classes"] == 2

    def test_labels_of_another_width(self, tmp_path: Path) -> None:
        module = MultiLabelTagging(encoder(), 80)
        with pytest.raises(ValueError, match=r"num_classes: the model has 80, but the labels have shape \[4, 3\]"):
            trainer(tmp_path, max_epochs=1).fit(module, loader(Pictures(8, tags=True)))


def words(width: int = 16) -> GRUEncoder:
    torch.manual_seed(3)
    return GRUEncoder(12, embedding_dim=8, hidden_size=width)


def caption_of(image: int, which: int) -> list[int]:
    """Tokens of a caption: the colour of the image, and a word that says little, sometimes twice."""
    return [1 + image % CLASSES, 4 + (image + which) % 8, 4][: 2 + which % 2]


class Captioned(Dataset[dict[str, Tensor]]):
    """Pictures with a caption each, for training; takes the keys of an epoch sampler."""

    def __init__(self, size: int) -> None:
        self.pictures = Pictures(size)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, item = key
        tokens = caption_of(item, epoch % 2)
        return {
            "image": self.pictures[item]["image"],
            "tokens": torch.tensor(tokens + [0] * (3 - len(tokens))),
            "lengths": torch.tensor(len(tokens)),
            "index": torch.tensor(item),
            "image_index": torch.tensor(item),
        }


class Captions(Dataset[dict[str, Tensor]]):
    """Two captions of every image."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return 2 * self.images

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        tokens = caption_of(item // 2, item % 2)
        return {
            "tokens": torch.tensor(tokens + [0] * (3 - len(tokens))),
            "lengths": torch.tensor(len(tokens)),
            "index": torch.tensor(item),
            "image_index": torch.tensor(item // 2),
        }


class SearchData(ShardedDataModule):
    """Twelve images to learn from in three steps an epoch, eleven to select by, and ten to test on."""

    def __init__(self, train: int = 12, validation: int = 11, test: int = 10) -> None:
        super().__init__(batch_size=4, num_workers=0, seed=0)
        self.sizes = train, validation, test

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(Captioned(self.sizes[0]))

    def _pair(self, images: int, noise: int) -> list[DataLoader[Any]]:
        parts = Pictures(images, noise), Captions(images)
        return [self.evaluation_loader(part, 3, f"{images} {type(part).__name__}") for part in parts]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._pair(self.sizes[1], 1)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._pair(self.sizes[2], 2)


def search(**options: Any) -> CrossModalSearch:
    image_encoder, text_encoder = encoder(), words()
    return CrossModalSearch(
        image_encoder, text_encoder, **{"embedding_dim": 16, "learning_rate": 1e-2, "fold_size": None, **options}
    )


class Judged(pl.Callback):
    """Keeps the weights of the common space at every judgement, whose sum of recalls it may dictate."""

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
    def test_learns(self, tmp_path: Path, loaded: list[str]) -> None:
        module = search(pretrained="some.ckpt", learning_rate=3e-2, milestones=[6])
        before = results_of(trainer(tmp_path), module, SearchData())
        run = trainer(tmp_path, max_epochs=12, use_distributed_sampler=False)
        run.fit(module, datamodule=SearchData(train=24))
        assert loaded == ["model.pretrained"]
        assert_same(encoder(7).state_dict(), module.image_encoder)
        metrics = results_of(run, module, SearchData())
        directions = [f"{d}_{name}" for d in ("i2t", "t2i") for name in ("r1", "r5", "r10", "medr", "meanr")]
        expected = {f"test/{name}{ending}" for name in directions for ending in ("", "_equal_text")}
        assert set(metrics) == expected | {"test/selected_epoch", "test/validation_recall_sum"}
        assert 1 <= metrics["test/selected_epoch"] <= 12
        assert metrics["test/t2i_r5"] > max(80, before["test/t2i_r5"])
        assert metrics["test/i2t_r1_equal_text"] >= metrics["test/i2t_r1"]

    def test_the_weights_of_the_best_epoch_are_tested(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        judged = Judged(monkeypatch, [10.0, 30.0, 30.0, 20.0])
        module = search()
        run = trainer(tmp_path, max_epochs=4, use_distributed_sampler=False)
        run.fit(module, datamodule=SearchData())
        assert judged.steps == [3, 6, 9, 12]
        assert_same(judged.weights[1], module.selected)
        assert_same(judged.weights[3], module.space)
        path = tmp_path / "last.ckpt"
        run.save_checkpoint(path)
        fresh = search()
        run = trainer(tmp_path)
        run.test(fresh, datamodule=SearchData(), ckpt_path=path, verbose=False, weights_only=True)
        assert_same(judged.weights[1], fresh.selected)
        assert run.callback_metrics["test/selected_epoch"] == 2
        assert run.callback_metrics["test/validation_recall_sum"] == pytest.approx(30)
        # The test is that of the selected weights, whatever the current ones are.
        for parameter in fresh.space.parameters():
            nn.init.zeros_(parameter)
        again = results_of(trainer(tmp_path), fresh, SearchData())
        assert again == pytest.approx({name: float(value) for name, value in run.callback_metrics.items()})

    # Three steps an epoch: 4 is in the middle of the second one, 3 and 6 are boundaries, written before the epoch is
    # judged, and 9 is the end of training.
    @pytest.mark.parametrize("step", [3, 4, 6, 9])
    def test_a_resumed_run_selects_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        file = MetricsFile(tmp_path / "metrics.csv")

        def run(checkpoint: Path | None) -> tuple[CrossModalSearch, list[int], dict[str, set[tuple[int, float]]]]:
            with monkeypatch.context() as patch:
                judged, module = Judged(patch), search()
                save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
                session = trainer(
                    tmp_path,
                    max_epochs=3,
                    callbacks=[StepSeed(0), *([save] if checkpoint is None else [])],
                    enable_checkpointing=True,
                    logger=file,
                    log_every_n_steps=1,
                    use_distributed_sampler=False,
                )
                session.fit(module, datamodule=SearchData(), ckpt_path=checkpoint, weights_only=True)
            return (
                module,
                judged.steps,
                {name: set(row) for name, row in read_metrics(tmp_path / "metrics.csv").items()},
            )

        whole, steps, curves = run(None)
        assert steps == [3, 6, 9]
        assert {at for at, _ in curves["val/recall_sum"]} == {3, 6, 8}
        file.drop_after(step - 1)
        resumed, steps, again = run(tmp_path / f"step={step}.ckpt")
        assert steps == [s for s in (3, 6, 9) if s >= step]
        assert again == curves
        assert_same(whole.state_dict(), resumed)
        for name in ("selected_epoch", "selected_recall_sum", "judged_step"):
            assert getattr(whole, name) == getattr(resumed, name)

    def test_judging_leaves_modes_and_random_numbers_alone(self, tmp_path: Path) -> None:
        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
                assert pl_module.space.training
                assert not pl_module.image_encoder.training
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

    def test_loss_is_that_of_the_batch(self) -> None:
        module = search(mask_same_image=False)
        batch = torch.utils.data.default_collate([Captioned(6)[0, item] for item in range(6)])
        with torch.no_grad():
            image = module.space.image(module.features(batch["image"]))
            text = module.space.text(batch["tokens"], batch["lengths"])
            loss = module.training_step(batch, 0)
        assert torch.allclose(image.norm(dim=1), torch.ones(6))
        assert torch.allclose(text.norm(dim=1), torch.ones(6))
        assert loss.item() == pytest.approx(in_batch_hinge(image @ text.T, 0.2, hardest=True).item())

    @pytest.mark.parametrize("hardest", [False, True])
    def test_captions_of_the_same_image_are_no_negatives(self, hardest: bool) -> None:
        samples = [Captioned(4)[epoch, item] for epoch, item in ((0, 0), (1, 0), (0, 1), (0, 2))]
        batch = torch.utils.data.default_collate(samples)
        module = search(hardest=hardest)
        with torch.no_grad():
            scores = module.space.image(module.features(batch["image"])) @ module.space.text(
                batch["tokens"], batch["lengths"]
            ).transpose(0, 1)
            found = module.training_step(batch, 0)
        of_image, of_text = [], []
        for i in range(4):
            others = [j for j in range(4) if batch["image_index"][j] != batch["image_index"][i]]
            of_image.append([max(0.0, 0.2 - float(scores[i, i] - scores[i, j])) for j in others])
            of_text.append([max(0.0, 0.2 - float(scores[i, i] - scores[j, i])) for j in others])
        reduce: Callable[[list[float]], float] = max if hardest else sum
        expected = sum(map(reduce, of_image)) + sum(map(reduce, of_text))
        assert found.item() == pytest.approx(expected, rel=1e-5)

    def test_a_broken_image_takes_its_captions_along(self, tmp_path: Path) -> None:
        module = search()
        keep = [0, 1, 2, 4, 5]
        captions = [2 * item + which for item in keep for which in range(2)]
        sound = [loader(Subset(Pictures(6), keep)), loader(Subset(Captions(6), captions))]
        # In the place of the broken file its neighbour is delivered twice.
        broken = [loader(Subset(Pictures(6), [0, 1, 2, 2, 4, 5])), loader(Captions(6))]
        assert results_of(trainer(tmp_path), module, broken) == results_of(trainer(tmp_path), module, sound)

    def test_collapse_finds_nothing(self, tmp_path: Path) -> None:
        module = search(fold_size=10)
        for parameter in module.selected.parameters():
            nn.init.zeros_(parameter)
        metrics = results_of(trainer(tmp_path), module, SearchData(test=20))
        assert metrics["test/i2t_r1"] == metrics["test/t2i_r5"] == 0

    @settings(deadline=None)
    @given(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=12), st.integers(0, 3))
    def test_equal_captions_are_those_with_equal_tokens(self, captions: list[list[int]], more: int) -> None:
        width = 4 + more
        tokens = torch.tensor([[*caption, *[9] * (width - len(caption))] for caption in captions])
        lengths = torch.tensor([len(caption) for caption in captions])
        numbers = text_numbers(tokens, lengths).tolist()
        # The same in a narrower batch.
        assert numbers == text_numbers(tokens[:, : max(1, int(lengths.max()))].int(), lengths).tolist()
        for left, number in zip(captions, numbers):
            for right, other in zip(captions, numbers):
                assert (left == right) == (number == other)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_runs_in_bfloat16(self, tmp_path: Path, precision: Any) -> None:
        module = search()
        run = trainer(tmp_path, max_epochs=2, precision=precision, use_distributed_sampler=False)
        run.fit(module, datamodule=SearchData())
        assert 0 <= results_of(run, module, SearchData())["test/i2t_r1"] <= 100

    def test_mistakes_name_the_field(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"embedding_dim: the common space has 1024 .* gives 16"):
            CrossModalSearch(encoder(), words(16))
        with pytest.raises(ValueError, match="data: CrossModalSearch selects"):
            trainer(tmp_path, max_epochs=1).fit(search(), loader(Pictures(4)))
        with pytest.raises(ValueError, match="test_dataloaders: CrossModalSearch needs two of them: images"):
            results_of(trainer(tmp_path), search(), loader(Pictures(4)))
        with pytest.raises(ValueError, match="fold_size: 10 images"):
            results_of(trainer(tmp_path), search(fold_size=1000), SearchData())


IMAGE = {
    "class_path": "common.encoders.image.ImageResNet",
    "init_args": {"layers": [1, 1, 1, 1], "bottleneck": False, "channels": [4, 4, 8, 8]},
}
TEXT = {"class_path": "common.encoders.text.GRUEncoder", "init_args": {"vocabulary_size": 12}}


@pytest.mark.parametrize(
    ("class_name", "init_args"),
    [
        ("LinearClassification", {"num_classes": 5, "learning_rates": [0.3, 30], "schedule": "cosine"}),
        ("SupervisedClassification", {"num_classes": 5, "milestones": [3, 6]}),
        ("MultiLabelSVM", {"pool": 2, "costs": [1, 10.0]}),
        ("MultiLabelTagging", {"num_classes": 80}),
        ("CrossModalSearch", {"text_encoder": TEXT, "fold_size": None, "milestones": [15]}),
    ],
)
def test_modules_are_built_from_a_config_and_keep_plain_hyper_parameters(
    tmp_path: Path, class_name: str, init_args: dict[str, Any]
) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningModule, "model")
    arguments = {"image_encoder": IMAGE, **init_args}
    config = {"model": {"class_path": f"papers.mct.evaluation.{class_name}", "init_args": arguments}}
    module = parser.instantiate_classes(parser.parse_object(config)).model
    assert not any(name in module.hparams for name in ("image_encoder", "text_encoder"))
    path = tmp_path / "hyper.pt"
    torch.save(dict(module.hparams), path)
    assert torch.load(path, weights_only=True) == dict(module.hparams)
