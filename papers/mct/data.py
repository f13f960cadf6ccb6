"""Loads captioned and tagged images to pre-train MCT. The miniature's worlds write files in COCO's layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.data.annotations import ImageAnnotations
from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.folder import FolderOfImages
from common.data.images import ImageItems
from common.data.item_dataset import Item, Sample, together
from common.data.listing import Listing
from common.data.text import CaptionTokenizer, normalize_caption, swap_left_right
from common.protocols.captions import CaptionData
from common.training.examples import Example, RandomTensors, batches_of_epoch
from common.types import Fraction


class CaptionedViews(ImageItems):
    """Returns two views of an image and two of its captions ([3] and [8]).

    The loss compares an image of one view with the caption of the other. So a caption's words left and right follow the
    flip of the other view's image.

    Args:
        tokenizer: None loads no captions.
        word_dropout: probability of dropping a word, in both views.
        swap_sides: whether to swap the words left and right in the caption for a flipped image.
    """

    def __init__(
        self,
        listing: Listing,
        annotations: ImageAnnotations,
        tokenizer: CaptionTokenizer | None,
        word_dropout: float = 0.0,
        swap_sides: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.annotations = annotations
        self.tokenizer = tokenizer
        self.word_dropout = word_dropout
        self.swap_sides = swap_sides

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        image = self.image(item.file)
        query, key = self.image_transform.draw(rng), self.image_transform.draw(rng)
        sample: Sample = {
            "image_query": (image, query),
            "image_key": (image, key),
            "tags": torch.from_numpy(self.annotations.tags[item.file]),
            "image_id": torch.tensor(int(self.annotations.image_ids[item.file])),
        }
        if self.tokenizer is not None:
            views = caption_views(self.annotations.captions[item.file], rng, self.word_dropout)
            for name, text, draws in zip(("query", "key"), views, (key, query)):
                text = normalize_caption(text)
                text = swap_left_right(text) if self.swap_sides and self.image_transform.flips(draws) else text
                sample[f"tokens_{name}"] = self.tokenizer.encode(text)
        return sample

    def transform(self, batch: list[Sample]) -> None:
        for name in ("image_query", "image_key"):
            together(batch, name, self.image_transform.together)


def caption_views(captions: Sequence[str], rng: np.random.Generator, word_dropout: float = 0.0) -> tuple[str, str]:
    """Choose two captions of an image in random order, and drop some words ([8]). A single caption is used twice."""
    place = int(rng.integers(len(captions)))
    first = second = captions[place]
    if len(captions) > 1:
        other = int(rng.integers(len(captions) - 1))
        second = captions[other + (other >= place)]
    if rng.random() < 0.5:
        first, second = second, first
    if word_dropout:
        return drop_words(first, rng, word_dropout), drop_words(second, rng, word_dropout)
    return first, second


def drop_words(caption: str, rng: np.random.Generator, share: float) -> str:
    """Drop each word of a caption with probability `share`, but keep at least one."""
    words = caption.split()
    keep = rng.random(len(words)) >= share
    if words and not keep.any():
        keep[rng.integers(len(words))] = True
    kept = [word for word, stays in zip(words, keep.tolist()) if stays]
    rng.random(len(kept))  # extra draw per word, to match recorded runs
    return " ".join(kept)


class PretrainingData(CaptionData):
    """Captioned and tagged images to pre-train MCT; see CaptionedViews, CaptionData, ImageData and ShardedDataModule.

    `caption_views`, `back_translations` and `other_drawing` have no effect; recorded runs set them.
    """

    views: ClassVar[type[CaptionedViews]] = CaptionedViews

    def __init__(
        self,
        dataset: COCO | COCOKarpathy | FolderOfImages,
        tokenizer: CaptionTokenizer | None,
        caption_views: Literal["sibling"] = "sibling",
        word_dropout: Fraction = 0.0,
        back_translations: None = None,
        swap_sides: bool = True,
        other_drawing: Literal[False] = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        self.word_dropout = word_dropout
        self.swap_sides = swap_sides

    @property
    def tag_names(self) -> Sequence[str]:
        return self.annotations.tag_names

    @property
    def view_options(self) -> dict[str, Any]:
        return {"word_dropout": self.word_dropout, "swap_sides": self.swap_sides, **self.options(training=True)}

    @cached_property
    def training_images(self) -> CaptionedViews:
        return self.views(self.listing, self.annotations, self.tokenizer, **self.view_options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.training_images, collate_fn=self.collate)

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        tags = module.loss.tag_count
        views = {f"image_{view}": self.example_images(size, draw)["image"] for view in ("query", "key")}
        batch = views | {
            "index": torch.arange(size), "image_id": torch.arange(size), "tags": draw.integers(0, 40, size, tags) < 1,
        }  # fmt: skip
        if self.tokenizer is not None:
            batch |= {f"tokens_{view}": self.example_captions(size, draw) for view in ("query", "key")}
        return Example(batch, self.published_batches(), {"tag_names": [str(number) for number in range(tags)]})

    def published_batches(self) -> int | None:
        """Return the batches per epoch of the published data set, or None if its size is unknown."""
        return batches_of_epoch(self.dataset.published_count(self.split), self.batch_size)
