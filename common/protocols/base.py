"""Code that the protocols share: base class, tables, checks and logging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from common.data.text import text_numbers
from common.encoders.checkpoint_files import load_encoder
from common.metrics.gathering import RowsOncePerSample
from common.metrics.retrieval import owner_rows
from common.monitoring.media import media_folder, write_table
from common.training.callbacks import listed

Batch = dict[str, Tensor]

#: Prefixes of an encoder's weights: in a protocol's checkpoint, and in a file with only the encoder.
PREFIXES = ("encoder.", "")


def required(encoder: nn.Module, name: str) -> Any:
    """Return an attribute of the encoder. If the encoder, perhaps the user's, lacks the attribute, raise an error."""
    if not hasattr(encoder, name):
        raise ValueError(f"{type(encoder).__name__} has no {name}, which this protocol needs (docs/own-encoder.md)")
    return getattr(encoder, name)


class EncoderModule(pl.LightningModule):
    """Base of the protocols. A frozen encoder has no gradient and stays in evaluation mode.

    Args:
        pretrained: checkpoint with the encoder's weights, read before training. None keeps the initial weights.
        encoder_prefixes: possible prefixes of the encoder's weights in `pretrained`; see `load_encoder`.
    """

    #: Content of each test loader, in order; empty if there may be any number of loaders.
    test_loaders: Sequence[str] = ()

    def __init__(
        self,
        encoder: nn.Module,
        pretrained: str | None = None,
        encoder_prefixes: Sequence[str] = PREFIXES,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False) if frozen else encoder
        self.pretrained = pretrained
        self.encoder_prefixes = list(encoder_prefixes)
        self._frozen = frozen

    def setup(self, stage: str) -> None:
        """Load the pre-trained encoder before training. In a test, Lightning loads the module's checkpoint instead."""
        if stage == "fit":
            data = getattr(self.trainer, "datamodule", None)
            if self.test_loaders and data is not None and is_overridden("test_dataloader", data):
                self._check_test_loaders(data.test_dataloader())
            if self.pretrained is not None:
                self.load_pretrained(self.pretrained)

    def load_pretrained(self, path: str) -> None:
        load_encoder(self.encoder, path, self.encoder_prefixes)

    def frozen(self) -> dict[str, nn.Module]:
        """Return the encoders that training does not change, by name."""
        return {"encoder": self.encoder} if self._frozen else {}

    def on_test_start(self) -> None:
        if self.test_loaders:
            self._check_test_loaders(self.trainer.test_dataloaders)

    def _check_test_loaders(self, loaders: Any) -> None:
        if (count := len(listed(loaders))) != (wanted := len(self.test_loaders)):
            raise ValueError(
                f"test_dataloaders: {type(self).__name__} needs {wanted} ({', '.join(self.test_loaders)}), but the "
                f"data has {count}; data.fit, data.held_out_fraction and data.clip_accuracy_clips add or remove loaders"
            )

    def train(self, mode: bool = True) -> Self:
        """Set the mode. Frozen encoders stay in evaluation mode, because their batch statistics must not change."""
        super().train(mode)
        for encoder in self.frozen().values():
            encoder.eval()
        return self

    def on_train_start(self) -> None:
        """Put frozen encoders into evaluation mode, because Lightning doesn't call `train`."""
        if self.frozen():
            self.train()


class PairRows:
    """Collects vectors of images and captions over a test, from batches of `CaptionData.gallery`."""

    def __init__(self) -> None:
        self.images = RowsOncePerSample("vector")
        self.captions = RowsOncePerSample("vector", "image_index", "text")

    def update(self, batch: Batch, vector: Tensor) -> None:
        """Add a batch of images or captions, with a vector per sample [B, d]."""
        if "tokens" in batch:
            text = text_numbers(batch["tokens"], batch["lengths"])
            self.captions.update(batch["index"], vector=vector, image_index=batch["image_index"], text=text)
        else:
            self.images.update(batch["index"], vector=vector)

    def compute(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return images [N, d], captions [M, d], the row of each caption's image [M], and a number per text [M]."""
        index, images = self.images.compute(device)
        _, captions = self.captions.compute(device)
        row, known = owner_rows(index, captions["image_index"])
        return images["vector"], captions["vector"][known], row, captions["text"][known]


def check_num_classes(module: pl.LightningModule, num_classes: int | None = None, fewest: int = 2) -> None:
    """Raise unless the data have `num_classes` classes (None: any number) and at least `fewest`."""
    found = getattr(getattr(module.trainer, "datamodule", None), "num_classes", None)
    if found is not None and found < fewest:
        raise ValueError(
            f"num_classes: the data set has {found}, but needs at least {fewest}: put the files of each class into a "
            "separate folder, or write a list with labels (or tags)"
        )
    if found is not None and num_classes not in (None, found):
        raise ValueError(
            f"num_classes: the model has {num_classes}, but the data set has {found}; set --model.num_classes {found}"
        )


def log_results(module: pl.LightningModule, metrics: Mapping[str, Tensor]) -> None:
    """Log values that are equal on all processes. Averaging them over processes would round them."""
    module.log_dict({name: value.float().to(module.device) for name, value in metrics.items()})


def mean_average_precision(
    module: pl.LightningModule, average: np.ndarray, details: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Average over the measured classes, in percent. Write all classes to `media/average_precision.csv`.

    If a class could not be measured, `average` [C] is NaN and its `details` give the reason under `left_out`.
    """
    judged = ~np.isnan(average)
    names = getattr(getattr(module.trainer, "datamodule", None), "class_names", None) or range(len(average))
    left_out = {str(name): detail["left_out"] for name, detail in zip(names, details) if detail["left_out"]}
    if not judged.any():
        raise ValueError(f"labels: no class can be measured; {next(iter(left_out.values()), 'there are none')}")
    if left_out:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:5])
        rank_zero_warn(f"{len(left_out)} of {len(average)} classes are left out of the mean ({listed})")
    if module.trainer.is_global_zero:
        classes = [
            {"class": str(name), **detail, "average_precision": None if np.isnan(value) else 100 * float(value)}
            for name, detail, value in zip(names, details, average)
        ]
        path = media_folder(module) / "average_precision.csv"
        write_table(module, path, list(classes[0]), [list(row.values()) for row in classes])
    mean, classes_judged = 100 * float(average[judged].mean()), float(judged.sum())
    return {"test/map": torch.tensor(mean), "test/classes": torch.tensor(classes_judged)}
