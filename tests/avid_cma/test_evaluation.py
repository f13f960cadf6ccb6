"""Downstream protocols on tiny synthetic sets."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.encoders.audio import AudioConvNet
from common.encoders.heads import ProjectionHead
from common.encoders.video import R2Plus1D
from papers.avid_cma.evaluation import ActionRecognition, LinearProbes, Probe, SoundSVM
from papers.avid_cma.model import AVID
from papers.avid_cma.weights import CheckpointError, export

GOLDEN = Path(__file__).parents[1] / "golden" / "avid_cma" / "probe_and_dense_eval.npz"
CLASSES = 3


class Videos(Dataset[dict[str, Tensor]]):
    """Videos whose class is a colour; with ``clips`` above 0 every item holds several clips."""

    def __init__(self, size: int, clips: int = 0, side: int = 16) -> None:
        self.size, self.clips, self.side = size, clips, side

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(item)
        label = item % CLASSES
        video = 0.5 * torch.randn(max(self.clips, 1), 3, 4, self.side, self.side, generator=draw)
        video[:, label] += 1.5
        return {
            "video": video if self.clips else video[0],
            "label": torch.tensor(label),
            "index": torch.tensor(item),
        }


class Sounds(Dataset[dict[str, Tensor]]):
    """Spectrograms whose class is a band; ``repeat`` delivers an earlier item in the place of a broken one."""

    def __init__(self, size: int, windows: int, folds: int, noise: int, repeat: dict[int, int] | None = None) -> None:
        self.size, self.windows, self.folds, self.noise = size, windows, folds, noise
        self.repeat = repeat or {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        item = self.repeat.get(item, item)
        draw = torch.Generator().manual_seed(1000 * self.noise + item)
        label = item % CLASSES
        audio = torch.randn(self.windows, 1, 16, 24, generator=draw)
        audio[..., 8 * label : 8 * label + 8] += 1.0
        return {
            "audio": audio,
            "label": torch.tensor(label),
            "index": torch.tensor(item),
            "fold": torch.tensor(1 + (item // CLASSES) % self.folds),
        }


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def results_of(run: pl.Trainer, module: pl.LightningModule, loaders: Any) -> dict[str, float]:
    """All metrics of a test."""
    run.test(module, loaders, verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def video_encoder() -> R2Plus1D:
    torch.manual_seed(0)
    return R2Plus1D(depth=10, width=2, stem_pool=False, stem_kernel=3)


def audio_encoder() -> AudioConvNet:
    torch.manual_seed(0)
    return AudioConvNet(width=2, small=True)


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    """A pre-training checkpoint with towers like those above but other weights."""
    torch.manual_seed(7)
    model = AVID(
        R2Plus1D(depth=10, width=2, stem_pool=False, stem_kernel=3),
        AudioConvNet(width=2, small=True),
        ProjectionHead(16, 4, 4),
        ProjectionHead(16, 4, 4),
    )
    path = tmp_path / "pretrained.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, path)
    return str(path)


def loader(dataset: Dataset[dict[str, Tensor]], batch: int = 4, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(dataset, batch_size=batch, shuffle=shuffle, generator=torch.Generator().manual_seed(0))


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(state: dict[str, Tensor], module: nn.Module) -> None:
    for key, value in module.state_dict().items():
        assert torch.equal(state[key], value), key


class Recorder(pl.Callback):
    """Keeps the weights, learning rate and gradients at the end of every epoch."""

    def __init__(self) -> None:
        self.encoder: list[dict[str, Tensor]] = []
        self.classifier: list[Tensor] = []
        self.rates: list[float] = []
        self.gradients: list[bool] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ActionRecognition)
        self.encoder.append(copy_of(pl_module.video_encoder))
        self.classifier.append(pl_module.classifier.weight.detach().clone())
        self.gradients.append(any(p.grad is not None for p in pl_module.video_encoder.parameters()))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class TestActionRecognition:
    def test_warm_up_trains_the_classifier_alone_and_milestones_count_after_it(
        self, tmp_path: Path, pretrained: str
    ) -> None:
        module = ActionRecognition(
            video_encoder(),
            CLASSES,
            pretrained=pretrained,
            learning_rate=1e-2,
            warmup_epochs=2,
            milestones=[1, 2],
            gamma=0.3,
        )
        record = Recorder()
        trainer(tmp_path, max_epochs=5, callbacks=[record]).fit(module, loader(Videos(8)))
        start = torch.load(pretrained, weights_only=True)["state_dict"]
        names = dict(module.video_encoder.named_parameters())
        for epoch in range(2):
            for name in names:
                assert torch.equal(record.encoder[epoch][name], start[f"model.video_model.{name}"]), name
            assert not record.gradients[epoch]
        mean = "conv1.1.running_mean"
        assert not torch.equal(record.encoder[0][mean], start[f"model.video_model.{mean}"])
        assert not torch.equal(record.classifier[0], record.classifier[1])
        assert not torch.equal(record.encoder[1]["conv1.0.weight"], record.encoder[2]["conv1.0.weight"])
        assert record.rates == pytest.approx([1e-2, 1e-2, 1e-2, 3e-3, 9e-4])

    def test_learns_and_is_tested_with_the_last_weights(self, tmp_path: Path) -> None:
        module = ActionRecognition(
            video_encoder(), CLASSES, dropout=0.1, learning_rate=1e-2, warmup_epochs=1, milestones=[12]
        )
        run = trainer(tmp_path, max_epochs=16)
        run.fit(module, loader(Videos(24), 8, shuffle=True))
        last = copy_of(module)
        metrics = results_of(run, module, [loader(Videos(10, clips=3), 4), loader(Videos(10, clips=5), 4)])
        assert_same(last, module)
        assert set(metrics) == {"test/video_top1", "test/video_top5", "test/clip_top1", "test/videos"}
        assert metrics["test/videos"] == 10
        assert metrics["test/video_top1"] >= 90
        assert metrics["test/clip_top1"] >= 80
        assert metrics["test/video_top5"] == 100

    def test_dense_evaluation_equals_the_official_one(self, tmp_path: Path) -> None:
        with np.load(GOLDEN, allow_pickle=False) as golden:
            logits, labels = torch.from_numpy(golden["dense_clip_logits"]), torch.from_numpy(golden["dense_target"])
            expected = float(golden["dense_top1"][0])

        class Given(Dataset[dict[str, Tensor]]):
            def __len__(self) -> int:
                return len(labels)

            def __getitem__(self, item: int) -> dict[str, Tensor]:
                return {"video": logits[item], "label": labels[item], "index": torch.tensor(item)}

        encoder = nn.Identity()
        encoder.feature_dim = 5  # type: ignore[assignment]
        module = ActionRecognition(encoder, 5)
        nn.init.eye_(module.classifier.weight)
        nn.init.zeros_(module.classifier.bias)
        metrics = results_of(trainer(tmp_path), module, loader(Given(), 3))
        assert metrics["test/video_top1"] == pytest.approx(expected)
        assert "test/clip_top1" not in metrics

    def test_a_repeated_video_counts_once(self, tmp_path: Path) -> None:
        module = ActionRecognition(video_encoder(), CLASSES)
        videos = Videos(6, clips=2)
        once = results_of(trainer(tmp_path), module, loader(videos, 4))
        twice = torch.utils.data.Subset(videos, [0, 0, 0, 1, 2, 3, 3, 4, 5])
        repeated = results_of(trainer(tmp_path), module, loader(twice, 4))
        assert repeated == once

    def test_random_clips_may_come_one_by_one(self, tmp_path: Path) -> None:
        several = Videos(5, clips=3)

        class Single(Dataset[dict[str, Tensor]]):
            """As the clips of a training set: item i shows video i modulo the number of videos."""

            def __len__(self) -> int:
                return 3 * len(several)

            def __getitem__(self, item: int) -> dict[str, Tensor]:
                sample = several[item % len(several)]
                return {**sample, "video": sample["video"][item // len(several)]}

        module = ActionRecognition(video_encoder(), CLASSES)
        results = [
            results_of(trainer(tmp_path), module, [loader(several), loader(clips)]) for clips in (several, Single())
        ]
        assert results[0] == pytest.approx(results[1])
        assert 0 < results[0]["test/clip_top1"] < 100

    def test_pretrained_weights_are_not_loaded_again_for_the_test(self, tmp_path: Path, pretrained: str) -> None:
        module = ActionRecognition(video_encoder(), CLASSES, pretrained=pretrained, warmup_epochs=0, learning_rate=1e-2)
        run = trainer(tmp_path, max_epochs=1)
        run.fit(module, loader(Videos(8)))
        trained = copy_of(module)
        Path(pretrained).unlink()
        run.test(module, loader(Videos(4, clips=2)), verbose=False)
        assert_same(trained, module)

    def test_mistakes_stop_before_training_and_name_the_field(self, tmp_path: Path, pretrained: str) -> None:
        other = R2Plus1D(depth=10, width=4, stem_pool=False, stem_kernel=3)
        with pytest.raises(CheckpointError, match=r"^model.pretrained: .*video_encoder"):
            trainer(tmp_path, max_epochs=1).fit(ActionRecognition(other, CLASSES, pretrained), loader(Videos(4)))
        with pytest.raises(CheckpointError, match=r"^model.pretrained: .*nowhere\.ckpt"):
            trainer(tmp_path, max_epochs=1).fit(
                ActionRecognition(video_encoder(), CLASSES, "nowhere.ckpt"), loader(Videos(4))
            )

        class Data(pl.LightningDataModule):
            num_classes = 101

            def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
                return loader(Videos(4))

        with pytest.raises(ValueError, match="num_classes: the model has 3, but the data have 101"):
            trainer(tmp_path, max_epochs=1).fit(ActionRecognition(video_encoder(), CLASSES), datamodule=Data())

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_runs_in_bfloat16(self, tmp_path: Path, precision: Any) -> None:
        module = ActionRecognition(video_encoder(), CLASSES, warmup_epochs=1)
        run = trainer(tmp_path, max_epochs=2, precision=precision)
        run.fit(module, loader(Videos(8)))
        metrics = results_of(run, module, loader(Videos(4, clips=2)))
        assert 0 <= metrics["test/video_top1"] <= 100


class TestLinearProbes:
    layers = {"conv2x": 2, "conv5x": 1, "pool": 1}  # noqa: RUF012

    def test_head_equals_the_official_one(self) -> None:
        with np.load(GOLDEN, allow_pickle=False) as golden:
            given = {key: torch.from_numpy(np.asarray(golden[key])) for key in golden}
        probe = Probe(channels=4, size=2, num_classes=5)
        with torch.no_grad():
            probe.linear.weight.copy_(given["W"])
            probe.linear.bias.copy_(given["b"])
            probe.norm.weight.copy_(given["bn_weight"])
            probe.norm.bias.copy_(given["bn_bias"])
            torch.testing.assert_close(probe(given["feat"]), given["logits_train"], rtol=1e-5, atol=1e-6)
            mean, var = probe.norm.running_mean, probe.norm.running_var
            torch.testing.assert_close(mean, given["running_mean_after"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(var, given["running_var_after"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(probe.eval()(given["feat"]), given["logits_eval"], rtol=1e-5, atol=1e-6)

    def test_sizes_of_the_paper(self) -> None:
        module = LinearProbes(R2Plus1D(), 400)
        sizes = {layer: probe.linear.in_features for layer, probe in module.probes.items()}
        assert sizes == {"conv2x": 9216, "conv3x": 8192, "conv4x": 9216, "conv5x": 8192}

    @pytest.mark.parametrize("official_quirks", [False, True])
    def test_encoder_stays_frozen_but_for_the_quirk(
        self, tmp_path: Path, pretrained: str, official_quirks: bool
    ) -> None:
        module = LinearProbes(
            video_encoder(), CLASSES, pretrained, self.layers, learning_rate=1e-2, official_quirks=official_quirks
        )
        start = torch.load(pretrained, weights_only=True)["state_dict"]
        run = trainer(tmp_path, max_epochs=2)
        run.fit(module, loader(Videos(12)))
        for name, value in module.video_encoder.named_parameters():
            assert torch.equal(value, start[f"model.video_model.{name}"]), name
        drifted = not torch.equal(
            module.video_encoder.conv1[1].running_mean, start["model.video_model.conv1.1.running_mean"]
        )
        assert drifted == official_quirks

    def test_every_stage_and_the_best_are_reported(self, tmp_path: Path) -> None:
        module = LinearProbes(video_encoder(), CLASSES, layers=self.layers, learning_rate=2e-2, milestones=[12])
        run = trainer(tmp_path, max_epochs=16)
        run.fit(module, loader(Videos(24), 8, shuffle=True))
        assert set(run.logged_metrics) >= {"train/loss", "train/conv2x_loss", "train/pool_loss"}
        metrics = results_of(run, module, loader(Videos(11, clips=2), 4))
        accuracies = [metrics[f"test/{layer}_top1"] for layer in self.layers]
        assert metrics["test/best_top1"] == max(accuracies) >= 70  # chance: 33
        assert metrics["test/videos"] == 11

    def test_a_stage_that_does_not_exist(self) -> None:
        with pytest.raises(ValueError, match=r"layers: .*conv5x.* got conv9x"):
            LinearProbes(video_encoder(), CLASSES, layers={"conv9x": 1})
        with pytest.raises(ValueError, match="video_encoder: Linear"):
            LinearProbes(nn.Linear(1, 1), CLASSES)


def plain_svm(module: SoundSVM, layer: str, train: Sounds, test: Sounds, folds: list[int]) -> float:
    """The protocol of specification 10.3 written down without care for memory, in float64."""

    def features(item: dict[str, Tensor]) -> np.ndarray:
        with torch.no_grad():
            maps = module.audio_encoder.forward_stages(item["audio"])[layer]  # type: ignore[operator]
        size = module.layers[layer]
        return nn.functional.adaptive_avg_pool2d(maps, size).flatten(1).double().numpy()

    accuracies = []
    for fold in folds:
        learn = [item for item in map(train.__getitem__, range(len(train))) if len(folds) == 1 or item["fold"] != fold]
        judge = [item for item in map(test.__getitem__, range(len(test))) if len(folds) == 1 or item["fold"] == fold]
        x = np.concatenate([features(item) for item in learn])
        y = np.concatenate([[int(item["label"])] * train.windows for item in learn])
        mean, std = x.mean(0), x.std(0) + 0.01
        machine = LinearSVC(C=module.C, loss="hinge", tol=1e-4, max_iter=200, intercept_scaling=1, random_state=0)
        machine.fit((x - mean) / std, y)
        right = [
            machine.decision_function((features(item) - mean) / std).mean(0).argmax() == item["label"] for item in judge
        ]
        accuracies.append(100 * float(np.mean(right)))
    return float(np.mean(accuracies))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
class TestSoundSVM:
    layers = {"conv5x": 2, "conv2x": 3}  # noqa: RUF012

    def test_five_folds(self, tmp_path: Path) -> None:
        module = SoundSVM(audio_encoder(), layers=self.layers)
        train, test = Sounds(30, 2, 5, noise=1), Sounds(30, 3, 5, noise=2)
        metrics = results_of(trainer(tmp_path), module, [loader(train, 4), loader(test, 7)])
        for layer in self.layers:
            expected = plain_svm(module.eval(), layer, train, test, [1, 2, 3, 4, 5])
            assert metrics[f"test/{layer}_top1"] == pytest.approx(expected, abs=1e-4)
        assert metrics["test/best_top1"] == max(metrics[f"test/{layer}_top1"] for layer in self.layers)
        assert metrics["test/files"] == 30
        assert metrics["test/best_top1"] > 60

    def test_fixed_lists(self, tmp_path: Path) -> None:
        module = SoundSVM(audio_encoder(), layers=self.layers, C=1.0, folds=1)
        train, test = Sounds(21, 2, 1, noise=1), Sounds(9, 3, 1, noise=2)
        metrics = results_of(trainer(tmp_path), module, [loader(train), loader(test)])
        assert metrics["test/files"] == 9
        expected = plain_svm(module.eval(), "conv5x", train, test, [1])
        assert metrics["test/conv5x_top1"] == pytest.approx(expected, abs=1e-4)

    def test_order_of_files_and_repeated_files_change_nothing(self, tmp_path: Path) -> None:
        module = SoundSVM(audio_encoder(), layers=self.layers, folds=2)
        train, test = Sounds(24, 2, 2, noise=1), Sounds(24, 2, 2, noise=2)
        once = results_of(trainer(tmp_path), module, [loader(train), loader(test)])
        order = [*torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist(), 3, 3, 17]
        mixed = [loader(torch.utils.data.Subset(part, order)) for part in (train, test)]
        repeated = results_of(trainer(tmp_path), module, mixed)
        assert repeated == once

    def test_several_processes_fit_the_same_machines(self, tmp_path: Path) -> None:
        results = []
        for jobs in (1, 2):
            module = SoundSVM(audio_encoder(), layers={"conv5x": 2}, folds=2, jobs=jobs)
            loaders = [loader(Sounds(24, 2, 2, noise)) for noise in (1, 2)]
            results.append(results_of(trainer(tmp_path), module, loaders))
        assert results[0] == results[1]

    def test_two_classes(self, tmp_path: Path) -> None:
        module = SoundSVM(audio_encoder(), layers={"conv2x": 4}, folds=1)
        keep = [i for i in range(30) if i % CLASSES != 1]
        parts = [torch.utils.data.Subset(Sounds(30, 2, 1, noise), keep) for noise in (1, 2)]
        metrics = results_of(trainer(tmp_path), module, [loader(part) for part in parts])
        assert metrics["test/best_top1"] > 80

    def test_exported_backbone_gives_the_same(self, tmp_path: Path, pretrained: str) -> None:
        exported = export(pretrained, tmp_path / "audio.pt", "audio")
        results = []
        for path in (pretrained, str(exported)):
            module = SoundSVM(audio_encoder(), path, self.layers, folds=2)
            loaders = [loader(Sounds(12, 2, 2, noise=1)), loader(Sounds(12, 2, 2, noise=2))]
            metrics = results_of(trainer(tmp_path), module, loaders)
            results.append(metrics)
        assert results[0] == results[1]
        untouched = SoundSVM(audio_encoder(), None, self.layers)
        assert not torch.equal(untouched.audio_encoder.conv1[0].weight, module.audio_encoder.conv1[0].weight)

    def test_mistakes_name_the_field(self, tmp_path: Path) -> None:
        module = SoundSVM(audio_encoder(), layers=self.layers, folds=5)
        parts = [loader(Sounds(12, 1, 2, noise=1)), loader(Sounds(12, 1, 2, noise=2))]
        with pytest.raises(ValueError, match=r"folds: 5 expected.*\[1, 2\]"):
            trainer(tmp_path).test(module, parts, verbose=False)
        with pytest.raises(ValueError, match="test_dataloaders"):
            trainer(tmp_path).test(module, parts[:1], verbose=False)
        with pytest.raises(ValueError, match="folds"):
            SoundSVM(audio_encoder(), folds=0)
        nn.init.constant_(module.audio_encoder.conv1[0].weight, float("nan"))
        broken = SoundSVM(module.audio_encoder, layers=self.layers, folds=2)
        with pytest.raises(ValueError, match=r"features: .*not finite"):
            trainer(tmp_path).test(broken, parts, verbose=False)


VIDEO = {
    "class_path": "common.encoders.video.R2Plus1D",
    "init_args": {"depth": 10, "width": 2, "stem_pool": False},
}
AUDIO = {"class_path": "common.encoders.audio.AudioConvNet", "init_args": {"width": 2, "small": True}}


@pytest.mark.parametrize(
    ("class_name", "init_args"),
    [
        ("ActionRecognition", {"video_encoder": VIDEO, "num_classes": 5, "milestones": [3, 6, 8]}),
        ("LinearProbes", {"video_encoder": VIDEO, "num_classes": 5, "layers": {"conv4x": 3}}),
        ("SoundSVM", {"audio_encoder": AUDIO, "layers": {"conv4x": 3}, "loss": "squared_hinge"}),
    ],
)
def test_modules_are_built_from_a_config_and_keep_plain_hyper_parameters(
    tmp_path: Path, class_name: str, init_args: dict[str, Any]
) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningModule, "model")
    config = {"model": {"class_path": f"papers.avid_cma.evaluation.{class_name}", "init_args": init_args}}
    module = parser.instantiate_classes(parser.parse_object(config)).model
    assert not any(name in module.hparams for name in ("video_encoder", "audio_encoder"))
    path = tmp_path / "hyper.pt"
    torch.save(dict(module.hparams), path)
    assert torch.load(path, weights_only=True) == dict(module.hparams)
