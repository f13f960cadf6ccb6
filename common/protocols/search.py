"""Image-text retrieval on frozen image features, as in VSE++."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.folder import FolderOfImages
from common.data.images import ImageItems
from common.data.text import CaptionTokenizer
from common.losses.margin import in_batch_hinge
from common.memory.collective import all_gather_concat, gather_with_gradient
from common.metrics.retrieval import caption_retrieval, folds
from common.protocols.base import PREFIXES, Batch, EncoderModule, PairRows, log_results, required
from common.protocols.captions import CaptionRows, PairData, check_vocabulary
from common.training.selection import BestWeights
from common.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class SearchSpace(nn.Module):
    """Embeds images and captions as unit vectors. `text_encoder` takes tokens [B, L], padded with 0."""

    def __init__(self, feature_dim: int, text_encoder: nn.Module, embedding_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(feature_dim, embedding_dim)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        self.text_encoder = text_encoder

    def image(self, features: Tensor) -> Tensor:
        """Embed image features [B, feature_dim] as [B, embedding_dim], in float32."""
        features = F.normalize(features.float()).to(self.projection.weight.dtype)
        return F.normalize(self.projection(features).float())

    def text(self, tokens: Tensor) -> Tensor:
        """Embed captions [B, L] as [B, embedding_dim], in float32."""
        return F.normalize(self.text_encoder(tokens).float())


class CrossModalSearch(EncoderModule):
    """Trains a linear layer on frozen image features together with a text encoder, for a common embedding space.

    The other pairs of the global batch are negatives. The test uses the weights of the epoch with the highest sum of
    six recalls on the validation split.

    The data module's `val_dataloader` and `test_dataloader` return two loaders each, images and captions. Logs
    `test/i2t_...` (image queries) and `test/t2i_...` (caption queries) of `caption_retrieval`. In metrics that end in
    `_equal_text`, captions with equal tokens match the same images. Also logs `test/selected_epoch` and
    `test/validation_recall_sum`.

    Args:
        text_encoder: maps tokens [B, L], padded with 0, to [B, embedding_dim].
        margin: by how much the similarity of a pair must exceed the similarities of negatives.
        hardest: count only the hardest negative of each image and caption.
        mask_same_image: don't use captions of the same image in a batch as negatives.
        learning_rate: learning rate of Adam.
        milestones: epochs at which the learning rate falls.
        fold_size: number of images per fold of the test, which are searched separately; None for all. Validation
            searches all.

    Shapes:
        Training batch: `image` [B, 3, H, W], `tokens` [B, L], `image_index` [B]. Batch of images: `image`,
        `index` [B]. Batch of captions: `tokens`, `lengths`, `index` [B], and `image_index` [B], the `index` of
        the caption's image.

    Source: Faghri et al., "VSE++: Improving Visual-Semantic Embeddings with Hard Negatives", BMVC 2018.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        pretrained: str | None = None,
        encoder_prefixes: Sequence[str] = PREFIXES,
        embedding_dim: PositiveInt = 1024,
        margin: NonNegativeFloat = 0.2,
        hardest: bool = True,
        mask_same_image: bool = True,
        learning_rate: PositiveFloat = 2e-4,
        milestones: Sequence[NonNegativeInt] = (15,),
        gamma: PositiveFloat = 0.1,
        fold_size: PositiveInt | None = 1000,
    ) -> None:
        super().__init__(image_encoder, pretrained, encoder_prefixes)
        self.save_hyperparameters(ignore=["image_encoder", "text_encoder"])
        width = getattr(text_encoder, "feature_dim", embedding_dim)
        if width != embedding_dim:
            raise ValueError(f"embedding_dim: expected the {width} dimensions of text_encoder, got {embedding_dim}")
        self.space = SearchSpace(required(image_encoder, "feature_dim"), text_encoder, embedding_dim)
        self.best = BestWeights(self.space, "recall_sum", "epoch")

    # -- training ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_vocabulary(self, self.space.text_encoder)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, SearchData):
            folds(len(data.searched(data.test_split)[0]), self.hparams["fold_size"])  # fail before training
            data.val_dataloader()  # the record names this data even if a resumed run does not validate again

    def embedded(self, batch: Batch) -> Tensor:
        """Embed a batch of images or captions, [B, embedding_dim]."""
        if "tokens" in batch:
            return self.space.text(batch["tokens"])
        return self.space.image(self.features(batch["image"]))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Compute the features [B, feature_dim] of images [B, 3, H, W]."""
        return self.encoder(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        image = gather_with_gradient(self.space.image(self.features(batch["image"])))
        text = gather_with_gradient(self.space.text(batch["tokens"]))
        with torch.autocast(image.device.type, enabled=False):
            scores = image @ text.T
            if self.hparams["mask_same_image"]:
                owner = all_gather_concat(batch["image_index"])
                same = (owner[:, None] == owner).fill_diagonal_(False)
                scores = scores.masked_fill(same, -torch.inf)
            loss = in_batch_hinge(scores, self.hparams["margin"], self.hparams["hardest"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self.best.compare(self, self.validate, self.global_step, self.current_epoch)

    def on_train_end(self) -> None:
        self.best.compare(self, self.validate, self.global_step, self.current_epoch, at_end=True)
        self.best.restore()
        super().on_train_end()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings: Any = self.hparams
        optimizer = torch.optim.Adam(self.space.parameters(), lr=settings["learning_rate"])
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(settings["milestones"]), settings["gamma"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    # -- selection -----------------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Compute the recalls on the validation split and their sum."""
        strategy, pairs = self.trainer.strategy, PairRows()
        precision = strategy.precision_plugin
        with precision.forward_context():
            for batch in itertools.chain(*self.trainer.datamodule.val_dataloader()):  # type: ignore[attr-defined]
                batch = strategy.batch_to_device(precision.convert_input(batch))
                pairs.update(batch, self.embedded(batch))
        recalls = {name: float(value) for name, value in self._search(pairs).items()}
        return {**recalls, "recall_sum": sum(recalls[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["selection"] = self.best.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "selection" in checkpoint:
            self.best.load(checkpoint["selection"])

    def _search(self, pairs: PairRows, fold_size: int | None = None, equal_text: bool = False) -> dict[str, Tensor]:
        image, caption, row, text = pairs.compute(self.device)
        return caption_retrieval(image, caption, row, fold_size, text if equal_text else None)

    # -- test ----------------------------------------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        self.pairs = PairRows()
        self.best.restore()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.pairs.update(batch, self.embedded(batch))

    def on_test_epoch_end(self) -> None:
        fold_size = self.hparams["fold_size"]
        metrics = self._search(self.pairs, fold_size)
        equal = self._search(self.pairs, fold_size, equal_text=True)
        metrics |= {f"{name}_equal_text": value for name, value in equal.items()}
        metrics |= {name: torch.tensor(value) for name, value in self.best.metrics().items()}
        log_results(self, {f"test/{name}": value for name, value in metrics.items()})


class SearchData(PairData):
    """Images and captions: train on `split`, select the epoch on `held_out_split`, test on `test_split`."""

    def __init__(
        self,
        dataset: COCO | COCOKarpathy | FolderOfImages,
        tokenizer: CaptionTokenizer,
        test_split: str = "test",
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        self.test_split = test_split

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not len(self.searched(self.test_split)[1]):
            raise ValueError(f"data.test_split: no image of {self.test_split} has a caption to search by")

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self.gallery(*self.searched(self.held_out_split), "validation")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self.gallery(*self.searched(self.test_split))

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as the run; every epoch asks for the same two splits
    def searched(self, split: str) -> tuple[ImageItems, CaptionRows]:
        images = ImageItems(self.dataset.listing(split), **self.options(training=False))
        used = [own[: self.captions_per_image] for own in self.dataset.annotations(split).captions]
        return images, CaptionRows(used, self.words)
