"""Replaces downloaded weights in the miniature by models trained on each clip's true words.

Classifiers that name their input (`ModalityClassification` on `CategoryData`) replace the classifiers of Kinetics and
AudioSet. A language model that answers from true words (`TextPretraining`) replaces T5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.data.clips import ClipDataset
from common.data.datasets.base import MediaDataset
from common.data.item_dataset import Item, Sample
from common.data.listing import Listing
from common.data.media import MediaError
from common.data.worlds.base import World
from common.metrics.gathering import OncePerSample
from common.protocols.text import TextTest
from common.training.data_module import ShardedDataModule
from common.training.examples import Example, RandomTensors, batches_of_epoch
from common.training.optimizers import adamw, clip_by_norm
from common.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from papers.vx2text.clips import DEFAULT_AUDIO, ONE_CLIP, AudioInput, ClipReader, VideoInput, made_up_clips
from papers.vx2text.language_model import LanguageModel
from papers.vx2text.loss import per_answer, text_loss
from papers.vx2text.prompt import Modality
from papers.vx2text.tokens import ModalityClassifier

Batch = dict[str, Any]

# -- training ----------------------------------------------------------------------------------------------------------


class ModalityClassification(pl.LightningModule):
    """Trains a classifier of `video` or `audio` whose categories are words. A clip may have several true words.

    `smoothing` spreads a share of the target over all categories. Without smoothing, the classifier gets overconfident:
    samples always name the same category, so wrong categories get no gradient. For the other settings see `adamw`.

    Source: [14], step 1.
    """

    configure_gradient_clipping = clip_by_norm

    def __init__(
        self,
        classifier: ModalityClassifier,
        modality: Modality,
        smoothing: Fraction = 0.0,
        learning_rate: PositiveFloat = 1e-3,
        weight_decay: NonNegativeFloat = 0.01,
        warmup_fraction: Fraction = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["classifier"], logger=False)
        self.classifier = classifier

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        return adamw(self, {"": h.learning_rate}, h.weight_decay, h.warmup_fraction)

    def forward(self, batch: Batch) -> Tensor:
        """Score the categories [B, C]. The batch has one clip per file."""
        return self.classifier(batch[self.hparams["modality"]][:, 0])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch)
        loss = words_loss(logits, batch["words"], self.hparams["smoothing"])
        self.log("train/loss", loss.detach(), batch_size=len(logits))
        return loss

    def on_test_start(self) -> None:
        self.test = OncePerSample("precision", "loss")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        precision, loss = precision_and_loss(self(batch), batch["words"])
        self.test.update(batch["index"], precision=precision, loss=loss)

    def on_test_epoch_end(self) -> None:
        means = self.test.compute(self.device)
        self.log_dict({"test/precision": means["precision"], "test/loss": means["loss"], "test/clips": means["count"]})


class TextPretraining(pl.LightningModule):
    """Trains the language model on text alone, with words in the places of modality tokens (settings: see `adamw`).

    Source: [14], step 2.
    """

    configure_gradient_clipping = clip_by_norm

    def __init__(
        self,
        language_model: LanguageModel,
        learning_rate: PositiveFloat = 1e-3,
        weight_decay: NonNegativeFloat = 0.01,
        warmup_fraction: Fraction = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["language_model"], logger=False)
        self.language_model = language_model
        self.test = TextTest()

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        return adamw(self, {"": h.learning_rate}, h.weight_decay, h.warmup_fraction)

    def forward(self, batch: Batch) -> Tensor:
        """Score the words of the answers [B, M, V]. Each score depends on the words before."""
        ids = batch["input_ids"]
        return self.language_model(self.language_model.embed(ids), ids != 0, batch["labels"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = text_loss(self(batch), batch["labels"])
        self.log("train/loss", loss.detach(), batch_size=len(batch["labels"]))
        return loss

    def on_test_start(self) -> None:
        self.test.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test.update_loss(batch["index"], *per_answer(self(batch), batch["labels"]))

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.test.compute(self.device).items()})


# -- what is known to be true ------------------------------------------------------------------------------------------


def words_loss(logits: Tensor, words: Tensor, smoothing: float) -> Tensor:
    """Return the label-smoothed cross-entropy with a uniform target over the true words. Both inputs are [B, C].

    Source: [14], step 1.
    """
    target = words.to(torch.float32)
    target = (1.0 - smoothing) * target / target.sum(1, keepdim=True) + smoothing / target.shape[1]
    return -(F.log_softmax(logits.float(), dim=1) * target).sum(1).mean()


def precision_and_loss(logits: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return precision [B] and loss [B] from inputs [B, C]. Precision is of the n most probable words, n being true."""
    words = words.float()
    number = words.sum(1)
    loss = -(logits.float().log_softmax(1) * words).sum(1) / number
    rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (words * (rank < number[:, None])).sum(1) / number, loss


# -- data --------------------------------------------------------------------------------------------------------------


class CategoryItems(ClipDataset):
    """Clips or sounds with `words` bool [C], the categories that their class name stands for (see `class_marks`)."""

    def __init__(self, listing: Listing, categories: Sequence[str], reader: ClipReader, **options: Any) -> None:
        super().__init__(listing, **options)
        self.reader = reader
        self.marks = class_marks(listing.classes, categories)

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        clip = self.listing[item.file]
        sample = self.reader.read(clip, rng)
        name = "audio" if self.reader.video is None else "video"
        if not sample[f"{name}_present"]:
            raise MediaError.of(clip.path, f"has no {name} stream")
        return {**sample, "words": self.marks[clip.label]}

    def transform(self, batch: list[Sample]) -> None:
        self.reader.transform(batch)


def class_marks(classes: Sequence[str], categories: Sequence[str]) -> Tensor:
    """Mark the true categories of each class, bool [classes, categories]: the class name, or else the words in it."""
    # Treat "crying_baby" and "Crying baby" as the same name.
    labels, words = [
        [re.sub(r"[\s_]+", " ", name.lower().strip()) for name in names] for names in (classes, categories)
    ]
    true = [{label} if label in words else set(label.split(" ")) for label in labels]
    if lacking := sorted(set().union(*true) - set(words)):
        raise ValueError(
            f"data.categories lacks {', '.join(lacking)}; list all categories of the classifier, in its order"
        )
    return torch.tensor([[word in names for word in words] for names in true])


class CategoryData(ShardedDataModule):
    """Labeled clips or sounds to train a classifier on ([14], step 1), with one clip cut from each file.

    `categories` follow the classifier's order; `fold` is for data sets with official folds.
    """

    def __init__(
        self,
        dataset: MediaDataset,
        categories: Sequence[str],
        modality: Modality,
        world: World | None = None,
        video: VideoInput = ONE_CLIP,
        audio: AudioInput = DEFAULT_AUDIO,
        fold: NonNegativeInt | None = None,
        train_split: str = "train",
        test_split: str = "validation",
        batch_size: PositiveInt = 64,
        test_batch_size: PositiveInt = 64,
        max_skipped_fraction: Fraction = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, world, batch_size=batch_size, max_skipped_fraction=max_skipped_fraction, **kwargs)
        self.categories = categories
        self.modality: Modality = modality
        self.video = video if modality == "video" else None
        self.audio = audio if modality == "audio" else None
        self.fold = fold
        self.train_split = train_split
        self.test_split = test_split
        self.test_batch_size = test_batch_size

    def items(self, split: str, training: bool) -> CategoryItems:
        return CategoryItems(
            self.dataset.listing(split, self.fold),
            self.categories,
            ClipReader(self.video, self.audio, training, self.cache_bytes),
            **self.item_options,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.items(self.train_split, training=True))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.items(self.test_split, training=False), self.test_batch_size)

    def example_batch(self, module: pl.LightningModule, size: int, draw: RandomTensors) -> Example:
        batch = made_up_clips(self.video, self.audio, size, draw)
        batch |= {"words": draw.integers(0, 4, size, len(self.categories)) < 1, "index": torch.arange(size)}
        items = self.dataset.published_counts.get(self.train_split)
        return Example(batch, batches_of_epoch(items, self.batch_size))
