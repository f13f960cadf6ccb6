"""Captioned and tagged images to pre-train MCT; the miniature's worlds write files in COCO's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common.data.annotations import ImageAnnotations
from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.folder import FolderOfImages
from common.data.images import ImageItems
from common.data.item_dataset import Sample
from common.data.listing import Listing
from common.data.media import MediaError
from common.data.text import (
    CaptionTokenizer,
    CaptionViews,
    caption_views,
    normalize_caption,
    read_back_translations,
    swap_left_right,
)
from common.protocols.captions import CaptionData
from common.training.examples import Draw, Example, batches_of_epoch
from common.types import Fraction


class CaptionedViews(ImageItems):
    """Two views of every image and of its captions ([3] and [8]).

    Left and right are swapped in a caption whose image is flipped. The query's image is compared with the key's
    caption, so that caption follows the query's flip, and vice versa.

    Args:
        tokenizer: None leaves captions out.
        word_dropout: share of words to drop from both views.
        back_translations: annotation id -> caption, for the mode `backtranslate`.
        other_drawing: the key shows another image of the same group, if there is one.
    """

    def __init__(
        self,
        listing: Listing,
        annotations: ImageAnnotations,
        tokenizer: CaptionTokenizer | None,
        mode: CaptionViews = "sibling",
        word_dropout: float = 0.0,
        back_translations: dict[int, str] | None = None,
        swap_sides: bool = True,
        other_drawing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.annotations = annotations
        self.tokenizer = tokenizer
        self.mode: CaptionViews = mode
        self.word_dropout = word_dropout
        self.back_translations = back_translations
        self.swap_sides = swap_sides
        self.siblings: dict[int, np.ndarray] = {}
        if other_drawing:
            self.siblings = {int(g): np.flatnonzero(annotations.groups == g) for g in np.unique(annotations.groups)}

    def _sample(self, item: int, image: Image.Image, rng: np.random.Generator) -> Sample:
        annotations = self.annotations
        group = self.siblings.get(int(annotations.groups[item]), np.array([item]))
        others = group[group != item]
        partner = int(rng.choice(others)) if len(others) else item
        query, query_flipped = self.transform(image, rng)
        key, key_flipped = self.transform(image if partner == item else self._other(partner, image), rng)
        sample: Sample = {
            "image_query": query,
            "image_key": key,
            "tags": torch.from_numpy(self.annotations.tags[item]),
            # Drawings that are each other's positives must not be negatives.
            "image_id": torch.tensor(int((annotations.groups if self.siblings else annotations.image_ids)[item])),
        }
        if self.tokenizer is not None:
            captions, ids = self.annotations.captions[item], self.annotations.caption_ids[item]
            views = caption_views(captions, ids, rng, self.mode, self.back_translations, self.word_dropout)
            for name, text, flipped in zip(("query", "key"), views, (key_flipped, query_flipped)):
                text = normalize_caption(text)
                text = swap_left_right(text) if self.swap_sides and flipped else text
                sample[f"tokens_{name}"] = self.tokenizer.encode(text)
        return sample

    def _other(self, partner: int, image: Image.Image) -> Image.Image:
        try:
            return self.image(partner)
        except MediaError as error:
            # The image itself is valid, so keep the sample.
            self.skipped.record(partner, error)
            return image


class PretrainingData(CaptionData):
    """Captioned and tagged images to pre-train MCT ([8]).

    Args:
        caption_views: `sibling`, two captions of the image; `backtranslate`, a caption and its back-translation; `eda`,
            a caption and a copy with words dropped and swapped (not replaced: we ship no list of synonyms); `same`.
        word_dropout: share of words to drop from both views.
        back_translations: JSON of annotation id -> back-translated caption.
        swap_sides: exchange left and right in captions of flipped images.
        other_drawing: the second view of an image is another image of its group, if there is one.
        kwargs: see CaptionData, ImageData and ShardedDataModule.
    """

    def __init__(
        self,
        dataset: COCO | COCOKarpathy | FolderOfImages,
        tokenizer: CaptionTokenizer | None,
        caption_views: CaptionViews = "sibling",
        word_dropout: Fraction = 0.0,
        back_translations: str | None = None,
        swap_sides: bool = True,
        other_drawing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        if caption_views == "backtranslate" and back_translations is None:
            raise ValueError(
                "data.caption_views is backtranslate, but data.back_translations names no file; make "
                "captions_train2017_bt.json (annotation id -> caption translated there and back), or use sibling"
            )
        self.caption_views: CaptionViews = caption_views
        self.word_dropout = word_dropout
        self.back_translations = back_translations
        self.swap_sides = swap_sides
        self.other_drawing = other_drawing
        self.views: Callable[..., CaptionedViews] = CaptionedViews

    @property
    def tag_names(self) -> Sequence[str]:
        return self.annotations.tag_names

    @cached_property
    def training_images(self) -> CaptionedViews:
        translated = None
        if self.caption_views == "backtranslate" and self.back_translations is not None:
            translated = read_back_translations(Path(self.back_translations))
            missing = [number for own in self.annotations.caption_ids for number in own if number not in translated]
            if missing:
                raise ValueError(
                    f"data.back_translations: {self.back_translations} lacks {len(missing)} captions of the split, the "
                    f"first is annotation {missing[0]}; translate all of them, or choose other caption_views"
                )
        return self.views(
            self.listing,
            self.annotations,
            self.tokenizer,
            mode=self.caption_views,
            word_dropout=self.word_dropout,
            back_translations=translated,
            swap_sides=self.swap_sides,
            other_drawing=self.other_drawing,
            **self.options(training=True),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.training_images, collate_fn=self.collate)

    def example_batch(self, module: Any, size: int, draw: Draw) -> Example:
        tags = module.loss.tag_count
        views = {f"image_{view}": self.example_images(size, draw)["image"] for view in ("query", "key")}
        batch = views | {
            "index": torch.arange(size), "image_id": torch.arange(size), "tags": draw.integers(0, 40, size, tags) < 1,
        }  # fmt: skip
        if self.tokenizer is not None:
            batch |= {f"tokens_{view}": self.example_captions(size, draw) for view in ("query", "key")}
        # The vocabulary doesn't have to fit the model's here.
        facts = {"vocabulary_size": 0, "tag_names": [str(number) for number in range(tags)]}
        return Example(batch, self.published_batches(), facts)

    def published_batches(self) -> int | None:
        """Batches per epoch of the published data set; None if its size is unknown."""
        return batches_of_epoch(self.dataset.published_count(self.split), self.batch_size)
