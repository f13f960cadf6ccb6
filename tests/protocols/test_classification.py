"""Test fine-tuning, linear probes and classifiers on tiny synthetic data sets."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from common.encoders.video import R2Plus1D
from common.errors import NonFiniteLossError
from common.metrics.linear_svm import average_precision
from common.protocols.bridge import BridgedRetrieval
from common.protocols.classification import (
    ActionRecognition,
    LinearClassification,
    LinearProbes,
    MultiLabelTagging,
    SupervisedClassification,
    probe,
)
from common.protocols.detection import Detection
from common.protocols.search import CrossModalSearch
from common.protocols.svm import SoundSVM
from common.training.callbacks import StopOnNonFiniteLoss
from tests.protocols.parts import (
    CLASSES,
    assert_same,
    audio_encoder,
    average_precisions_of,
    checkpoint,
    copy_of,
    image_encoder,
    loader,
    no_encoder,
    of_features,
    pictures,
    results_of,
    trainer,
    video_encoder,
    videos,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "avid_cma" / "probe_and_dense_eval.npz"


@pytest.fixture
def pretrained_video(tmp_path: Path) -> str:
    """Write a checkpoint with an encoder like `video_encoder()` but with other weights."""
    torch.manual_seed(7)
    return checkpoint(tmp_path / "pretrained.ckpt", encoder=R2Plus1D(depth=10, width=2, stem_pool=False, stem_kernel=3))


class Recorder(pl.Callback):
    """Record weights and learning rate of every epoch, and whether the encoder has gradients in each step."""

    def __init__(self) -> None:
        self.encoder: list[dict[str, Tensor]] = []
        self.classifier: list[Tensor] = []
        self.rates: list[float] = []
        self.gradients: list[bool] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ActionRecognition)
        self.encoder.append(copy_of(pl_module.encoder))
        self.classifier.append(pl_module.heads[0][1].weight.detach().clone())

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ActionRecognition)
        self.gradients.append(any(p.grad is not None for p in pl_module.encoder.parameters()))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class TestActionRecognition:
    def test_warm_up_trains_the_classifier_alone_and_milestones_count_after_it(
        self, tmp_path: Path, pretrained_video: str
    ) -> None:
        options: dict[str, Any] = {"learning_rate": 1e-2, "warmup_epochs": 2, "milestones": [1, 2], "gamma": 0.3}
        module = ActionRecognition(video_encoder(), CLASSES, pretrained=pretrained_video, **options)
        record = Recorder()
        trainer(tmp_path, max_epochs=5, callbacks=[record]).fit(module, loader(videos(8)))
        start = torch.load(pretrained_video, weights_only=True)["state_dict"]
        names = dict(module.encoder.named_parameters())
        for epoch in range(2):
            for name in names:
                assert torch.equal(record.encoder[epoch][name], start[f"encoder.{name}"]), name
        assert record.gradients == 2 * 2 * [False] + 3 * 2 * [True]  # the encoder's gradients are skipped to save time
        mean = "conv1.1.running_mean"
        assert not torch.equal(record.encoder[0][mean], start[f"encoder.{mean}"])
        assert not torch.equal(record.classifier[0], record.classifier[1])
        assert not torch.equal(record.encoder[1]["conv1.0.weight"], record.encoder[2]["conv1.0.weight"])
        assert record.rates == pytest.approx([1e-2, 1e-2, 1e-2, 3e-3, 9e-4])

    def test_learns_and_is_tested_with_the_last_weights(self, tmp_path: Path) -> None:
        module = ActionRecognition(
            video_encoder(), CLASSES, dropout=0.1, learning_rate=1e-2, warmup_epochs=1, milestones=[12]
        )
        run = trainer(tmp_path, max_epochs=16)
        run.fit(module, loader(videos(24), 8, shuffle=True))
        last = copy_of(module)
        metrics = results_of(run, module, [loader(videos(10, clips=3), 4), loader(videos(10, clips=5), 4)])
        assert_same(last, module)
        assert metrics["test/videos"] == 10
        assert metrics["test/video_top1"] >= 90
        assert metrics["test/clip_top1"] >= 80
        assert metrics["test/video_top5"] == 100

    def test_accuracies_of_videos_and_of_single_clips(self, tmp_path: Path) -> None:
        module = ActionRecognition(no_encoder(6), 6)
        nn.init.eye_(module.heads[0][1].weight)
        nn.init.zeros_(module.heads[0][1].bias)
        # In video i, the first clip strongly shows class i, the second weakly shows the next class. Other classes tie.
        clips = torch.stack([2 * torch.eye(6), torch.eye(6).roll(1, 1)], dim=1)
        # Three videos have the label of their first clip, one has that of its second clip, and two have other labels.
        given = loader(of_features(clips, torch.tensor([0, 1, 2, 4, 1, 2]), "video"))
        expected = {"test/video_top1": 50, "test/video_top5": 400 / 6, "test/clip_top1": 200 / 6, "test/videos": 6}
        assert results_of(trainer(tmp_path), module, [given, given]) == pytest.approx(expected)
        three_of_four = {"head": torch.eye(4)}, {}, {"label": torch.tensor([0, 1, 2, 0])}
        assert module.curves(*three_of_four) == {"clip_top1": 75}
        assert SupervisedClassification(no_encoder(4), 4).curves(*three_of_four) == {"top1": 75}


class TestLinearProbes:
    layers = {"conv2x": 2, "conv5x": 1, "pool": 1}  # noqa: RUF012

    def test_head_equals_the_official_one(self) -> None:
        with np.load(GOLDEN, allow_pickle=False) as golden:
            given = {key: torch.from_numpy(np.asarray(golden[key])) for key in golden}
        head = probe(channels=4, side=2, num_classes=5)
        _, _, norm, line = head
        with torch.no_grad():
            line.weight.copy_(given["W"])
            line.bias.copy_(given["b"])
            norm.weight.copy_(given["bn_weight"])
            norm.bias.copy_(given["bn_bias"])
            torch.testing.assert_close(head(given["feat"]), given["logits_train"], rtol=1e-5, atol=1e-6)
            mean, var = norm.running_mean, norm.running_var
            torch.testing.assert_close(mean, given["running_mean_after"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(var, given["running_var_after"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(head.eval()(given["feat"]), given["logits_eval"], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("official_quirks", [False, True])
    def test_encoder_stays_frozen_but_for_the_quirk(
        self, tmp_path: Path, pretrained_video: str, official_quirks: bool
    ) -> None:
        options: dict[str, Any] = {"learning_rate": 1e-2, "official_quirks": official_quirks}
        module = LinearProbes(video_encoder(), CLASSES, self.layers, pretrained=pretrained_video, **options)
        start = torch.load(pretrained_video, weights_only=True)["state_dict"]
        run = trainer(tmp_path, max_epochs=2)
        run.fit(module, loader(videos(12)))
        for name, value in module.encoder.named_parameters():
            assert torch.equal(value, start[f"encoder.{name}"]), name
        drifted = not torch.equal(module.encoder.conv1[1].running_mean, start["encoder.conv1.1.running_mean"])
        assert drifted == official_quirks

    def test_every_stage_and_the_best_are_reported(self, tmp_path: Path) -> None:
        module = LinearProbes(video_encoder(), CLASSES, layers=self.layers, learning_rate=2e-2, milestones=[12])
        run = trainer(tmp_path, max_epochs=16)
        run.fit(module, loader(videos(24), 8, shuffle=True))
        losses = {name: float(value) for name, value in run.logged_metrics.items()}
        total = losses.pop("train/loss")
        assert run.progress_bar_metrics == {"train/loss": total} == {"train/loss": pytest.approx(sum(losses.values()))}
        assert set(losses) == {f"train/{layer}_loss" for layer in self.layers}
        metrics = results_of(run, module, loader(videos(11, clips=2), 4))
        accuracies = {name: 100 * round(0.11 * value) / 11 for name, value in metrics.items() if name != "test/videos"}
        assert metrics == pytest.approx({**accuracies, "test/videos": 11})  # each is a share of 11 videos
        del accuracies["test/best_top1"]
        assert metrics["test/best_top1"] == pytest.approx(max(accuracies.values()))
        assert 70 <= metrics["test/best_top1"] < 101  # chance is 33 %
        with pytest.raises(ValueError, match="layers"):
            LinearProbes(video_encoder(), CLASSES, {"pool": 1, "absent": 1})


class Rates(pl.Callback):
    """Record the learning rates of every step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class TestLinearClassification:
    def fitted(self, tmp_path: Path, rates: list[float], **options: Any) -> LinearClassification:
        module = LinearClassification(image_encoder(), CLASSES, learning_rates=rates, milestones=[2])
        for classifier in module.heads:
            nn.init.zeros_(classifier.weight)
        trainer(tmp_path, max_epochs=3, **options).fit(module, loader(pictures(12)))
        return module

    @pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1e3}])
    def test_a_rate_that_diverges_leaves_the_others_alone_and_is_not_chosen(
        self, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        stop = StopOnNonFiniteLoss(str(tmp_path))
        module = self.fitted(tmp_path, [3e38, 0.3], callbacks=[stop], **options)
        assert module.heads[0].weight.abs().max() > 1e37
        alone = self.fitted(tmp_path, [0.3], **options)
        torch.testing.assert_close(alone.heads[0].weight, module.heads[1].weight)
        # The diverged rate must not be chosen, even if no other rate predicts anything correctly.
        nn.init.constant_(module.heads[1].bias, torch.finfo().min / 10)
        nn.init.zeros_(module.heads[1].weight)
        metrics = results_of(trainer(tmp_path), module, [loader(pictures(5)), loader(pictures(6))])
        assert metrics["test/learning_rate"] == pytest.approx(0.3)
        assert metrics["test/top1"] == metrics["test/validation_top1_lr_0.3"] == 0

    def test_if_all_diverge_the_run_stops(self, tmp_path: Path) -> None:
        with pytest.raises(NonFiniteLossError):
            self.fitted(tmp_path, [3e38], callbacks=[StopOnNonFiniteLoss(str(tmp_path))])
        module = LinearClassification(image_encoder(), CLASSES, learning_rates=[1.0, 2.0])
        for classifier in module.heads:
            nn.init.constant_(classifier.weight, torch.nan)
        with pytest.raises(ValueError, match="learning_rates"):
            results_of(trainer(tmp_path), module, [loader(pictures(4)), loader(pictures(4))])
        with pytest.raises(ValueError, match="test_dataloaders"):
            results_of(trainer(tmp_path), module, loader(pictures(4)))

    def test_held_out_images_choose_and_test_images_judge(self, tmp_path: Path) -> None:
        module = LinearClassification(no_encoder(6), 6, learning_rates=[0.3, 3, 30])
        for shift, classifier in enumerate(module.heads):
            with torch.no_grad():
                classifier.weight.copy_(torch.eye(6).roll(shift, 0))
        features, labels = torch.eye(6), torch.arange(6)
        # Rate 3 (shifted by one) predicts all held-out labels correctly, but only one of six test labels.
        test_labels = torch.where(labels == 0, 1, labels)
        held_out, test = of_features(features, (labels + 1) % 6), of_features(features, test_labels)
        metrics = results_of(trainer(tmp_path), module, [loader(held_out), loader(test)])
        assert metrics == pytest.approx(
            {
                "test/top1": 100 / 6,
                "test/top5": 100 / 6,  # the five other classes tie, and a tie doesn't count as a hit
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

    def test_learns_with_the_encoder_as_it_was_loaded(self, tmp_path: Path, pretrained: str) -> None:
        module = LinearClassification(
            image_encoder(), CLASSES, pretrained=pretrained, learning_rates=[0.03, 0.3, 3], milestones=[15]
        )
        run = trainer(tmp_path, max_epochs=20)
        run.fit(module, loader(pictures(24), 8, shuffle=True))
        assert_same(image_encoder(7).state_dict(), module.encoder)
        assert not any(parameter.requires_grad for parameter in module.encoder.parameters())
        assert set(run.logged_metrics) == {"train/loss", *(f"train/loss_lr_{rate}" for rate in (0.03, 0.3, 3))}
        Path(pretrained).unlink()  # must not be read again in the test
        held_out, test = pictures(9, noise=1), pictures(13, noise=2)
        metrics = results_of(run, module, [loader(held_out), loader(test)])
        assert metrics["test/top1"] > 80
        assert metrics["test/top5"] == 100
        repeated = [loader(Subset(part, [0, 0, *range(len(part)), 3])) for part in (held_out, test)]
        assert results_of(run, module, repeated) == pytest.approx(metrics)

    def test_schedules(self, tmp_path: Path) -> None:
        for schedule, expected in (
            ("steps", [1, 1, 0.1, 0.1, 0.01, 0.01]),
            ("cosine", [0.5 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]),
        ):
            record = Rates()
            module = LinearClassification(
                image_encoder(), CLASSES, learning_rates=[0.3, 30], schedule=schedule, milestones=[1, 2]
            )
            trainer(tmp_path, max_epochs=3, callbacks=[record]).fit(module, loader(pictures(8)))
            np.testing.assert_allclose(record.rates, np.outer(expected, [0.3, 30]), atol=1e-12)


class TestSupervisedClassification:
    def test_the_whole_network_learns(self, tmp_path: Path) -> None:
        record = Rates()
        module = SupervisedClassification(image_encoder(), CLASSES, learning_rate=0.05, milestones=[10])
        start = copy_of(module)
        run = trainer(tmp_path, max_epochs=12, callbacks=[record])
        run.fit(module, loader(pictures(24), 8, shuffle=True))
        assert [rates[0] for rates in record.rates] == pytest.approx([0.05] * 30 + [0.005] * 6)
        assert not torch.equal(start["encoder.conv1.weight"], module.encoder.conv1.weight)
        assert not torch.equal(start["encoder.bn1.running_mean"], module.encoder.bn1.running_mean)
        assert {name.split(".")[0] for name in module.state_dict()} == {"encoder", "heads"}
        last = copy_of(module)
        metrics = results_of(run, module, loader(pictures(13, noise=1)))
        assert_same(last, module)
        right = round(0.13 * metrics["test/top1"])
        assert metrics == pytest.approx({"test/top1": 100 * right / 13, "test/top5": 100, "test/images": 13})
        assert 10 < right <= 13


class TestMultiLabelTagging:
    def test_learns_and_reports_the_mean_average_precision(self, tmp_path: Path, pretrained: str) -> None:
        module = MultiLabelTagging(image_encoder(), CLASSES, pretrained=pretrained, learning_rate=0.3, milestones=[15])
        run = trainer(tmp_path, max_epochs=20)
        run.fit(module, loader(pictures(24, tags=True), 8, shuffle=True))
        assert_same(image_encoder(7).state_dict(), module.encoder)
        test = pictures(21, 1, tags=True)
        metrics = results_of(run, module, loader(Subset(test, [0, 0, *range(21), 5])))
        samples = [test[item] for item in range(21)]
        labels = torch.stack([sample["labels"] for sample in samples]).numpy()
        with torch.no_grad():
            scores = module.eval()(torch.stack([sample["image"] for sample in samples]))["head"].numpy()
        average = [100 * average_precision(scores[:, c], labels[:, c]) for c in range(CLASSES)]
        assert metrics == pytest.approx({"test/map": np.mean(average), "test/classes": 3, "test/images": 21}, abs=1e-3)
        assert metrics["test/map"] > 80
        listed = average_precisions_of(tmp_path)
        assert [entry["average_precision"] for entry in listed] == pytest.approx(average)
        assert [entry["left_out"] for entry in listed] == [""] * CLASSES
        with pytest.raises(ValueError, match=r"test_dataloaders: MultiLabelTagging needs 1 \(test images\)"):
            results_of(run, module, [loader(test), loader(test)])

    def test_difficult_entries_teach_nothing(self) -> None:
        module = MultiLabelTagging(no_encoder(4), 2)
        images, labels = torch.randn(3, 4), torch.tensor([[1, -1], [0, -1], [-1, -1]], dtype=torch.int8)
        loss = module.training_step({"image": images, "labels": labels, "index": torch.arange(3)}, 0)
        loss.backward()
        assert module.heads[0].weight.grad is not None
        assert module.heads[0].weight.grad[0].abs().sum() > 0
        assert module.heads[0].weight.grad[1].abs().sum() == 0
        with torch.no_grad():
            scores = module(images)["head"][:2, 0]
        expected = nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor([1.0, 0.0]), reduction="sum") / 3
        assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", ["none", "l2", "batch_norm"])
def test_features_are_normalized_and_logits_precise(kind: Any) -> None:
    module = LinearClassification(no_encoder(3), 3, [1.0], normalize_features=kind)
    assert module.heads[0].weight.std().item() == pytest.approx(0.01, rel=0.8)
    assert not module.heads[0].bias.any()
    assert not list(module.norm.parameters())
    nn.init.eye_(module.heads[0].weight)
    given = torch.tensor([[3.0, 0.0, 4.0], [1.0, 2.0, 2.0], [0.0, 5.0, -12.0]])
    lengths, centered = torch.tensor([[5.0], [3.0], [13.0]]), given - given.mean(0)
    expected = {"none": given, "l2": given / lengths, "batch_norm": centered / given.std(0, correction=0)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(given)["1"], expected[kind], rtol=1e-4, atol=1e-4)
        assert MultiLabelTagging(no_encoder(3), 2)(given)["head"].dtype == torch.float32


def test_what_a_model_needs_of_the_data_is_checked(tmp_path: Path) -> None:
    encoder = no_encoder(4)
    encoder.vocabulary_size = 4  # type: ignore[assignment]
    modules: list[tuple[Any, str, int, int]] = [
        (LinearClassification(encoder, 2), "num_classes", 2, 1),
        (MultiLabelTagging(encoder, 1), "num_classes", 1, 0),
        (Detection(image_encoder(), 1), "num_classes", 1, 0),
        (SoundSVM(audio_encoder(), {"conv5x": 1}), "num_classes", 2, 1),
        (CrossModalSearch(encoder, encoder, embedding_dim=4), "vocabulary_size", 4, 5),
        (BridgedRetrieval(encoder, encoder), "vocabulary_size", 4, 5),
    ]
    for module, name, right, wrong in modules:
        run: Any = trainer(tmp_path)
        module.trainer, run.datamodule = run, SimpleNamespace(**{name: right})
        module.setup("test")
        run.datamodule = SimpleNamespace(**{name: wrong})
        with pytest.raises(ValueError, match=name):
            module.setup("test")
