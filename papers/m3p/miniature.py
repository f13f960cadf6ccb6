"""Replaces downloads in the miniature: trains the region detector, and a warm start in place of XLM-R."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.data.datasets.imagenet import ImageNet
from common.data.image_transforms import ImageTransform
from common.data.images import ImageItems
from common.data.worlds.base import World
from common.metrics.classification import hits
from common.metrics.gathering import OncePerSample
from common.training.data_module import ShardedDataModule
from common.training.optimizers import clip_by_norm, warm_up_then_cosine
from common.types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from papers.m3p.data import check_sizes
from papers.m3p.encoder import M3P
from papers.m3p.loss import embedding_contrast
from papers.m3p.module import adam, start_from
from papers.m3p.regions import RegionNetwork
from papers.m3p.search import RetrievalTest


class RegionClassifier(pl.LightningModule):
    """Trains the miniature's region detector. `prepare_regions` only needs this checkpoint.

    Args:
        classes: number of outputs, at least the number of categories in the data.
        smoothing: share of the target spread over all classes.
        learning_rate, weight_decay: of AdamW with a warm-up and a cosine decay.

    Source: [13.2] (b) and 13.3.
    """

    def __init__(
        self,
        classes: PositiveInt = 96,
        channels: Sequence[PositiveInt] = (16, 32, 64, 64),
        side: PositiveInt = 32,
        smoothing: Fraction = 0.1,
        learning_rate: PositiveFloat = 3e-3,
        weight_decay: NonNegativeFloat = 0.05,
        warmup_fraction: Fraction = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.network = RegionNetwork(classes, channels, side)

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        count = len(data.dataset.listing("train").classes)
        if count > self.hparams["classes"]:
            raise ValueError(f"model.classes: {self.hparams['classes']} is too few for {count} categories; raise it")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scores = self.network(batch["image"])
        loss = F.cross_entropy(scores, batch["label"], label_smoothing=self.hparams["smoothing"])
        self.log("train/loss", loss.detach(), batch_size=len(scores))
        return loss

    def on_test_start(self) -> None:
        self.accuracy = OncePerSample("top1", "top5")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        scores, labels = self.network(batch["image"]), batch["label"]
        self.accuracy.update(batch["index"], top1=hits(scores, labels), top5=hits(scores, labels, 5))

    def on_test_epoch_end(self) -> None:
        means = self.accuracy.compute(self.device)
        self.log_dict({f"test/{name}": (100 * means[name]).float() for name in self.accuracy.names})

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=h.learning_rate, weight_decay=h.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        factor = warm_up_then_cosine(round(h.warmup_fraction * total), total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class RegionPictures(ShardedDataModule):
    """Pictures by category, to train `RegionClassifier`. Crops down to a quarter teach it to classify quarters."""

    def __init__(
        self,
        dataset: ImageNet,
        world: World | None = None,
        image: ImageTransform | None = None,
        batch_size: PositiveInt = 128,
        test_batch_size: PositiveInt = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, world, batch_size=batch_size, **kwargs)
        self.image = image or ImageTransform()
        self.test_batch_size = test_batch_size

    def items(self, split: str, training: bool) -> ImageItems:
        return ImageItems(self.dataset.listing(split), self.image, training=training, **self.item_options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.items("train", training=True))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.items("validation", training=False), self.test_batch_size)


class MeansTest(RetrievalTest):
    """Tests retrieval by mean word and region embeddings, without the encoder's blocks."""

    def start(self, regions: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
        return self.module.model.encoder.mean_of_regions(regions, boxes, region_mask)[:, None]

    def scores(self, image: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, *_: Any) -> Tensor:
        text = self.module.model.encoder.mean_of_words(tokens.to(image.device), token_mask.to(image.device))
        return (F.normalize(image[:, 0], dim=1) @ F.normalize(text, dim=1).T).cpu()


class WarmStart(pl.LightningModule):
    """Aligns word and region embeddings before pre-training, in place of XLM-R's weights.

    Contrasts the mean word embedding of each caption with the mean region embedding of its image, within the batch.
    Only trains these embeddings. Without a warm start, the encoder long scores all candidates alike ([13.2]).

    Args:
        pretrained: checkpoint of another stage; None means random weights.
        learning_rate, warmup_steps: see `papers.m3p.module.adam`.
    """

    def __init__(
        self,
        model: M3P,
        temperature: PositiveFloat = 0.1,
        pretrained: str | None = None,
        learning_rate: PositiveFloat = 1e-3,
        warmup_steps: PositiveInt = 10,
        captions_per_image: PositiveInt | None = 5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"], logger=False)
        self.model = model.requires_grad_(False)
        model.encoder.token.requires_grad_(True)
        model.encoder.region.requires_grad_(True)
        self.test = MeansTest(1, captions_per_image)

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        check_sizes(self.model.encoder, data)
        if self.hparams["pretrained"] is not None and self.trainer.ckpt_path is None:
            start_from(self.hparams["pretrained"], self.model)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        groups = [group for relation in batch["relations"] for group in relation.values()]
        terms = [embedding_contrast(self.model, group, self.hparams["temperature"]) for group in groups]
        loss, accuracy = (torch.stack(values).mean() for values in zip(*terms))
        size = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy}, batch_size=size)
        return loss

    def configure_optimizers(self) -> Any:
        return adam(self, self.hparams["learning_rate"], self.hparams["warmup_steps"])

    configure_gradient_clipping = clip_by_norm

    def on_test_start(self) -> None:
        self.test.reset(self)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.test.update(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.test.compute().items()})
