"""Make tiny synthetic data sets, encoders and trainers for tests of the protocols."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.encoders.audio import AudioConvNet
from common.encoders.image import ImageResNet
from common.encoders.video import R2Plus1D
from common.metrics.gathering import gather_rows
from tests.distributed.harness import free_port

CLASSES = 3


Samples = list[dict[str, Tensor]]


def videos(size: int, clips: int = 0, side: int = 16) -> Samples:
    """Make noise videos with one louder color per class. With `clips` above 0, each item has several clips."""

    def sample(item: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(item)
        label = item % CLASSES
        video = 0.5 * torch.randn(max(clips, 1), 3, 4, side, side, generator=draw)
        video[:, label] += 1.5
        return {"video": video if clips else video[0], "label": torch.tensor(label), "index": torch.tensor(item)}

    return [sample(item) for item in range(size)]


def sounds(size: int, windows: int, folds: int, noise: int) -> Samples:
    """Make noise spectrograms with one louder frequency band per class."""

    def sample(item: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1000 * noise + item)
        label = item % CLASSES
        audio = torch.randn(windows, 1, 16, 24, generator=draw)
        audio[..., 8 * label : 8 * label + 8] += 1.0
        fold = {"fold": torch.tensor(1 + (item // CLASSES) % folds)} if folds > 1 else {}
        return {"audio": audio, "label": torch.tensor(label), "index": torch.tensor(item), **fold}

    return [sample(item) for item in range(size)]


def pictures(size: int, noise: int = 0, tags: bool = False) -> Samples:
    """Make pictures with one brighter color channel per class, or, with `tags`, with a label per bright channel."""

    def sample(item: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1000 * noise + item)
        image = 0.2 * torch.randn(3, 8, 8, generator=draw)
        label = item % CLASSES
        present = torch.tensor([(item >> channel) & 1 for channel in range(CLASSES)], dtype=torch.int8)
        image += 1.5 * (present if tags else torch.eye(CLASSES)[label])[:, None, None]
        found = {"image": image, "index": torch.tensor(item)}
        return found | ({"labels": present} if tags else {"label": torch.tensor(label)})

    return [sample(item) for item in range(size)]


def relabeled(samples: Samples, labels: Tensor) -> Samples:
    return [{**sample, "labels": own} for sample, own in zip(samples, labels)]


def of_features(features: Tensor, labels: Tensor, kind: str = "image") -> Samples:
    """Make a data set of features instead of images or videos."""
    rows = enumerate(zip(features, labels, strict=True))
    return [{kind: own, "label": label, "index": torch.tensor(item)} for item, (own, label) in rows]


def video_encoder() -> R2Plus1D:
    torch.manual_seed(0)
    return R2Plus1D(depth=10, width=2, stem_pool=False, stem_kernel=3)


def audio_encoder() -> AudioConvNet:
    torch.manual_seed(0)
    return AudioConvNet(width=2, small=True)


def image_encoder(seed: int = 0) -> ImageResNet:
    torch.manual_seed(seed)
    return ImageResNet(
        (1, 1, 1, 1), bottleneck=False, channels=(8, 8, 16, 32), stem_channels=8, stem_kernel=3, stem_pool=False
    )


def no_encoder(width: int) -> nn.Module:
    module = nn.Identity()
    module.feature_dim = width  # type: ignore[assignment]
    return module


def trainer(tmp_path: Path | None, **options: Any) -> pl.Trainer:
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


class RankedTrainer(pl.Trainer):
    """A trainer with a given rank and number of processes."""

    ranks: tuple[int, int] = (0, 1)

    @property
    def global_rank(self) -> int:
        return self.ranks[0]

    @property
    def world_size(self) -> int:
        return self.ranks[1]


def attached(data: Any, stage: str = "fit", rank: int = 0, world_size: int = 1) -> Any:
    """Set up a data module as a trainer does, and return it."""
    data.trainer = RankedTrainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    data.trainer.ranks = (rank, world_size)
    data.prepare_data()
    data.setup(stage)
    return data


def results_of(run: pl.Trainer, module: pl.LightningModule, loaders: Any) -> dict[str, float]:
    """Run a test, and return all its metrics."""
    data = {"datamodule": loaders} if isinstance(loaders, pl.LightningDataModule) else {"dataloaders": loaders}
    run.test(module, **data, verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("test/")}


def loader(dataset: Any, batch: int = 4, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(dataset, batch_size=batch, shuffle=shuffle, generator=torch.Generator().manual_seed(0))


class SameOnAll(pl.Callback):
    """Check at the end of training that all processes have the same weights."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in pl_module.named_parameters():
            copies = gather_rows(value.detach().double().flatten()[None])
            assert torch.equal(copies[0], copies[1]), name


def distributed_trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    os.environ["MASTER_PORT"] = free_port()
    return trainer(tmp_path, devices=2, strategy="ddp_fork", **options)


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(state: dict[str, Tensor], module: nn.Module) -> None:
    for key, value in module.state_dict().items():
        assert torch.equal(state[key], value), key


def checkpoint(path: Path, **encoders: nn.Module) -> str:
    """Write a checkpoint with several encoders, each under its own name."""
    state = {
        f"{name}.{key}": value for name, encoder in encoders.items() for key, value in encoder.state_dict().items()
    }
    torch.save({"state_dict": state}, path)
    return str(path)


def average_precisions_of(tmp_path: Path) -> list[dict[str, Any]]:
    with (tmp_path / "media" / "average_precision.csv").open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name]) if row[name] else None for name in ("C", "average_precision") if name in row}
    return rows
