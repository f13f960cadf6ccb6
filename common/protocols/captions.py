"""Images with captions, for pre-training and retrieval protocols."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.data.annotations import ImageAnnotations
from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.folder import FolderOfImages
from common.data.images import ImageItems, require_captions
from common.data.item_dataset import Item, Sample
from common.data.listing import Listing
from common.data.text import CaptionTokenizer, normalize_caption, pad_tokens
from common.protocols.data import ImageData
from common.training.examples import Example, RandomTensors, batches_of_epoch
from common.types import PositiveInt

#: Range of word ids in synthetic captions, which every vocabulary has.
EXAMPLE_WORDS = (5, 40)


class CaptionRows(Dataset[Sample]):
    """All captions of some images. An item is one caption: `tokens`, `index` and `image_index`."""

    def __init__(self, captions: Sequence[Sequence[str]], tokenizer: CaptionTokenizer) -> None:
        self.text = [normalize_caption(text) for own in captions for text in own]
        self.image = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, item: int) -> Sample:
        return {
            "tokens": self.tokenizer.encode(self.text[item]),
            "index": torch.tensor(item),
            "image_index": torch.tensor(int(self.image[item])),
        }


class CaptionPairs(ImageItems):
    """Pairs of an image and one of its captions. With fewer than `captions_per_image` captions, captions repeat."""

    def __init__(
        self,
        listing: Listing,
        annotations: ImageAnnotations,
        tokenizer: CaptionTokenizer,
        captions_per_image: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.passes = captions_per_image
        self.annotations = annotations
        self.tokenizer = tokenizer

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        captions = self.annotations.captions[item.file]
        tokens = self.tokenizer.encode(normalize_caption(captions[item.slot % len(captions)]))
        return {**super().read(item, rng), "tokens": tokens, "image_index": torch.tensor(item.file)}


class CaptionData(ImageData):
    """Images with captions.

    Args:
        tokenizer: without a file, it learns a vocabulary from the training captions. None leaves out captions.
        held_out_batch_size: images or captions per step, per device.
    """

    def __init__(
        self,
        dataset: COCO | COCOKarpathy | FolderOfImages,
        tokenizer: CaptionTokenizer | None,
        split: str = "train",
        held_out_split: str = "val",
        held_out_batch_size: PositiveInt = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.tokenizer = tokenizer
        self.split = split
        self.held_out_split = held_out_split
        self.held_out_batch_size = held_out_batch_size

    def prepare_data(self) -> None:
        super().prepare_data()
        if self.tokenizer is not None:
            listing = self.dataset.listing(self.split)
            annotations = self.dataset.annotations(self.split, listing)
            require_captions(listing, annotations)
            self._fit_tokenizer(annotations)

    def setup(self, stage: str) -> None:
        self.listing = self.dataset.listing(self.split)
        self.annotations = self.dataset.annotations(self.split, self.listing)
        self.held_out_listing = self.dataset.listing(self.held_out_split)
        self.held_out_annotations = self.dataset.annotations(self.held_out_split, self.held_out_listing)
        if self.tokenizer is not None:
            self._fit_tokenizer(self.annotations)
            if not any(map(len, self.held_out_annotations.captions)):
                raise ValueError(f"data.held_out_split: no image of {self.held_out_split} has a caption to search by")

    def _fit_tokenizer(self, annotations: ImageAnnotations) -> None:
        self.words.prepare(text for own in annotations.captions for text in own)

    @property
    def words(self) -> CaptionTokenizer:
        if self.tokenizer is None:
            raise ValueError("data.tokenizer is null, but the model reads captions: set its class_path")
        return self.tokenizer

    @property
    def vocabulary_size(self) -> int:
        """Return the size of the tokenizer's vocabulary, 0 without a tokenizer. Call `setup` first."""
        return 0 if self.tokenizer is None else self.tokenizer.vocabulary_size

    def collate(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Stack samples to a batch. Pad tokens to the longest caption, and add `lengths` [B]."""
        batch: dict[str, Tensor] = {}
        for name in samples[0]:
            rows = [sample[name] for sample in samples]
            if name.startswith("tokens"):
                batch[name] = pad_tokens(rows, self.words.pad_id)
                batch[f"lengths{name.removeprefix('tokens')}"] = torch.tensor([len(row) for row in rows])
            else:
                batch[name] = torch.stack(rows)
        return batch

    @cached_property
    def held_out_images(self) -> ImageItems:
        return ImageItems(self.held_out_listing, **self.options(training=False))

    @cached_property
    def held_out_captions(self) -> CaptionRows:
        return CaptionRows(self.held_out_annotations.captions, self.words)

    def example_captions(self, size: int, draw: RandomTensors) -> Tensor:
        """Draw `size` synthetic captions of maximum length, [size, L]."""
        return draw.integers(*EXAMPLE_WORDS, size, self.words.max_tokens)

    def test_dataloader(self) -> Any:
        if self.tokenizer is None:
            return self.evaluation_loader(self.held_out_images, self.held_out_batch_size)
        return self.gallery(self.held_out_images, self.held_out_captions)

    def gallery(self, images: ImageItems, captions: CaptionRows, role: str = "test") -> list[DataLoader[Any]]:
        """Return two loaders for retrieval: images and captions."""
        return [
            self.evaluation_loader(images, self.held_out_batch_size, role),
            self.evaluation_loader(captions, self.held_out_batch_size, f"{role} captions", collate_fn=self.collate),
        ]


class PairData(CaptionData):
    """Training pairs of an image and one of its captions; see CaptionPairs."""

    def __init__(
        self,
        dataset: COCO | COCOKarpathy | FolderOfImages,
        tokenizer: CaptionTokenizer,
        captions_per_image: PositiveInt = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        self.captions_per_image = captions_per_image

    def train_dataloader(self) -> DataLoader[Any]:
        pairs = CaptionPairs(
            self.listing, self.annotations, self.words, self.captions_per_image, **self.options(training=True)
        )
        return self.training_loader(pairs, collate_fn=self.collate)

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        tokens = self.example_captions(size, draw)
        batch = self.example_images(size, draw) | {
            "tokens": tokens, "lengths": torch.full((size,), tokens.shape[1]), "image_index": torch.arange(size),
        }  # fmt: skip
        images = self.dataset.published_count(self.split)
        items = None if images is None else images * self.captions_per_image
        # Here, the data's vocabulary may differ from the model's.
        return Example(batch, batches_of_epoch(items, self.batch_size))


def check_vocabulary(module: pl.LightningModule, encoder: nn.Module | None) -> None:
    """Check that a text encoder's `vocabulary_size` is at least the tokenizer's, or raise."""
    size: Any = getattr(encoder, "vocabulary_size", None)
    if size is None:
        return
    needed = getattr(getattr(module.trainer, "datamodule", None), "vocabulary_size", 0)
    if needed > size:
        raise ValueError(
            f"the tokenizer has {needed} word pieces, but model.text_encoder only {size} embeddings; raise "
            "model.text_encoder.vocabulary_size"
        )
