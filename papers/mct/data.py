"""Data modules of MCT: captioned images to pre-train on, and what the transfer protocols read.

The miniature uses the very same classes: its worlds write files in the layouts of COCO, Karpathy's split, Pascal VOC
and ImageNet, and the data sets are pointed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.annotations import ImageAnnotations
from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.images import ImageItems
from common.data.items import Sample
from common.data.listing import Listing
from common.data.media import MediaError
from common.data.text import (
    CaptionTokenizer,
    CaptionViews,
    caption_views,
    normalise_caption,
    pad_tokens,
    read_back_translations,
    swap_left_right,
)
from common.protocols.data import ImageData, check_fraction, evenly_spaced

# -- captions ----------------------------------------------------------------------------------------------------------


class CaptionRows(Dataset[Sample]):
    """The captions of some images, one by one: `tokens`, `index` and `image_index`.

    Args:
        captions: of every image.
        tokenizer: makes tokens of them.
    """

    def __init__(self, captions: Sequence[Sequence[str]], tokenizer: CaptionTokenizer) -> None:
        self.text = [normalise_caption(text) for own in captions for text in own]
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


class CaptionedViews(ImageItems):
    """Two views of every image and of its captions (specification 3 and 8).

    Left and right change places in a caption whose image is flipped. The query's image meets the key's caption, so that
    caption follows its flip, and the other way round.

    Args:
        listing, annotations: the images, and their captions and tags.
        tokenizer: makes tokens of captions; None leaves them out.
        mode: how the two views of a caption differ.
        word_dropout: share of words left out of both views.
        back_translations: annotation id -> caption, for the mode `backtranslate`.
        swap_sides: whether captions follow the flips.
        other_drawing: the key shows another image of the same group, where there is one.
        options: see ImageItems.
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
            # Another drawing of the same thing is no negative either, where drawings are each other's positives.
            "image_id": torch.tensor(int((annotations.groups if self.siblings else annotations.image_ids)[item])),
        }
        if self.tokenizer is not None:
            captions, ids = self.annotations.captions[item], self.annotations.caption_ids[item]
            views = caption_views(captions, ids, rng, self.mode, self.back_translations, self.word_dropout)
            for name, text, flipped in zip(("query", "key"), views, (key_flipped, query_flipped)):
                text = normalise_caption(text)
                text = swap_left_right(text) if self.swap_sides and flipped else text
                sample[f"tokens_{name}"] = self.tokenizer.encode(text)
        return sample

    def _other(self, partner: int, image: Image.Image) -> Image.Image:
        try:
            return self.image(partner)
        except MediaError as error:
            # The image itself is sound, so its sample is kept.
            self.skipped.record(partner, error)
            return image


class BicaptionedImages(ImageItems):
    """An image with one of its captions, forwards and backwards, as VirTex reads them (specification 11).

    Args:
        listing, annotations: the images and their captions.
        tokenizer: makes tokens of captions.
        options: see ImageItems.
    """

    def __init__(
        self, listing: Listing, annotations: ImageAnnotations, tokenizer: CaptionTokenizer, **options: Any
    ) -> None:
        super().__init__(listing, **options)
        self.annotations = annotations
        self.tokenizer = tokenizer

    def _sample(self, item: int, image: Image.Image, rng: np.random.Generator) -> Sample:
        captions = self.annotations.captions[item]
        view, flipped = self.transform(image, rng)
        text = normalise_caption(captions[int(rng.integers(len(captions))) if self.training else 0])
        tokens = self.tokenizer.encode(swap_left_right(text) if flipped else text)
        return {"image": view, "tokens": tokens, "tokens_reversed": tokens[::-1]}


class SearchedImages(ImageItems):
    """Pairs of an image and one of its captions; an epoch shows an image as often as it has captions (specification 9).

    Args:
        listing, annotations: the images and their captions.
        tokenizer: makes tokens of captions.
        captions_per_image: captions of each image that are used; one with fewer shows some twice.
        options: see ImageItems.
    """

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

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        number = (key[1] if isinstance(key, tuple) else key) // len(self.listing)

        def pair(file: int, rng: np.random.Generator) -> Sample:
            captions = self.annotations.captions[file]
            text = normalise_caption(captions[number % len(captions)])
            image = self.transform(self.image(file), rng)[0]
            return {"image": image, "tokens": self.tokenizer.encode(text), "image_index": torch.tensor(file)}

        return self._usable(key, pair)


class CaptionData(ImageData):
    """Images with captions, and the tokenizer of these.

    Args:
        tokenizer: makes tokens of captions; a vocabulary of its own is made from the training captions. None leaves
            captions out.
        split, held_out_split: listings to train on and to measure on.
        held_out_batch_size: images or captions per step of that, per device.
        kwargs: see ImageData and ShardedDataModule.
    """

    def __init__(
        self,
        dataset: COCO | COCOKarpathy,
        tokenizer: CaptionTokenizer | None,
        split: str = "train",
        held_out_split: str = "val",
        held_out_batch_size: int = 64,
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
            self._fit_tokenizer(self.dataset.annotations(self.split))

    def setup(self, stage: str) -> None:
        self.listing = self.dataset.listing(self.split)
        self.annotations = self.dataset.annotations(self.split, self.listing)
        self.held_out_listing = self.dataset.listing(self.held_out_split)
        self.held_out_annotations = self.dataset.annotations(self.held_out_split, self.held_out_listing)
        if self.tokenizer is not None:
            self._fit_tokenizer(self.annotations)

    def _fit_tokenizer(self, annotations: ImageAnnotations) -> None:
        self.words.prepare(text for own in annotations.captions for text in own)

    @property
    def words(self) -> CaptionTokenizer:
        """The tokenizer.

        Raises:
            ValueError: there is none.
        """
        if self.tokenizer is None:
            raise ValueError("data.tokenizer is null, but the model reads captions: give it a class")
        return self.tokenizer

    @property
    def vocabulary_size(self) -> int:
        """Pieces of the tokenizer, 0 without one; known after setup."""
        return 0 if self.tokenizer is None else self.tokenizer.vocabulary_size

    def collate(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Stack a batch; tokens are padded to the longest caption in it, and `lengths` [B] kept."""
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
        """Images that training never sees, without augmentation."""
        return ImageItems(self.held_out_listing, **self.options(training=False))

    @cached_property
    def held_out_captions(self) -> CaptionRows:
        """Their captions."""
        return CaptionRows(self.held_out_annotations.captions, self.words)

    def test_dataloader(self) -> Any:
        if self.tokenizer is None:
            return self.evaluation_loader(self.held_out_images, self.held_out_batch_size)
        return self.gallery(self.held_out_images, self.held_out_captions)

    def gallery(self, images: ImageItems, captions: CaptionRows, role: str = "test") -> list[DataLoader[Any]]:
        """Loaders of images and of captions that are searched by each other."""
        return [
            self.evaluation_loader(images, self.held_out_batch_size, role),
            self.evaluation_loader(captions, self.held_out_batch_size, f"{role} captions", collate_fn=self.collate),
        ]


class PretrainingData(CaptionData):
    """Captioned and tagged images to pre-train MCT on (specification 8).

    Args:
        caption_views: `sibling`, two captions of the image; `backtranslate`, a caption and its back-translation; `eda`,
            a caption and a copy with words dropped and swapped (not replaced: no list of synonyms is shipped); `same`.
        word_dropout: share of words left out of both views.
        back_translations: JSON of annotation id -> back-translated caption.
        swap_sides: exchange left and right in captions of flipped images.
        other_drawing: the second view of an image is another image of its group, where there is one.
        kwargs: see CaptionData, ImageData and ShardedDataModule.
    """

    def __init__(
        self,
        dataset: COCO | COCOKarpathy,
        tokenizer: CaptionTokenizer | None,
        caption_views: CaptionViews = "sibling",
        word_dropout: float = 0.0,
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

    @property
    def tag_names(self) -> Sequence[str]:
        """Tags of the data set; known after setup."""
        return self.annotations.tag_names

    @cached_property
    def training_images(self) -> CaptionedViews:
        """The training set."""
        translated = None
        if self.caption_views == "backtranslate" and self.back_translations is not None:
            translated = read_back_translations(Path(self.back_translations))
            missing = [number for own in self.annotations.caption_ids for number in own if number not in translated]
            if missing:
                raise ValueError(
                    f"data.back_translations: {self.back_translations} lacks {len(missing)} captions of the split, the "
                    f"first is annotation {missing[0]}; translate all of them, or choose other caption_views"
                )
        return CaptionedViews(
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


class BicaptioningData(CaptionData):
    """Images with a caption forwards and backwards, to pre-train VirTex on (specification 11)."""

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self._images(self.listing, self.annotations, True), collate_fn=self.collate)

    def test_dataloader(self) -> Any:
        images = self._images(self.held_out_listing, self.held_out_annotations, False)
        return self.evaluation_loader(images, self.held_out_batch_size, collate_fn=self.collate)

    def _images(self, listing: Listing, annotations: ImageAnnotations, training: bool) -> BicaptionedImages:
        return BicaptionedImages(listing, annotations, self.words, **self.options(training))


class SearchData(CaptionData):
    """Images and captions to be found by each other: trained on one split, selected on another, tested on a third.

    Args:
        test_split: listing to test on; `held_out_split` is the one to select on.
        captions_per_image: captions of every image that are used.
        kwargs: see CaptionData, ImageData and ShardedDataModule.
    """

    def __init__(
        self,
        dataset: COCO | COCOKarpathy,
        tokenizer: CaptionTokenizer,
        test_split: str = "test",
        captions_per_image: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        self.test_split = test_split
        self.captions_per_image = captions_per_image

    def train_dataloader(self) -> DataLoader[Any]:
        pairs = SearchedImages(
            self.listing, self.annotations, self.words, self.captions_per_image, **self.options(training=True)
        )
        return self.training_loader(pairs, collate_fn=self.collate)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self.gallery(*self._searched(self.held_out_split), "validation")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self.gallery(*self._searched(self.test_split))

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as the run; every epoch asks for the same two splits
    def _searched(self, split: str) -> tuple[ImageItems, CaptionRows]:
        images = ImageItems(self.dataset.listing(split), **self.options(training=False))
        used = [own[: self.captions_per_image] for own in self.dataset.annotations(split).captions]
        return images, CaptionRows(used, self.words)


class BridgeData(CaptionData):
    """Pairs to train a bridge between two encoders on, pairs to choose its learning rate by, and pairs to judge it by.

    The first two are of the split that the encoders were pre-trained on, and the tokenizer is that of the pre-training.

    Args:
        held_out_share: share of the images of `split`, evenly spaced, that the learning rate is chosen by.
        captions_per_image: captions of every image that are used.
        kwargs: see CaptionData and ImageData.
    """

    def __init__(
        self,
        dataset: COCO | COCOKarpathy,
        tokenizer: CaptionTokenizer,
        held_out_share: float = 0.02,
        captions_per_image: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        check_fraction(held_out_share)
        self.held_out_share = held_out_share
        self.captions_per_image = captions_per_image

    def setup(self, stage: str) -> None:
        super().setup(stage)
        kept_back = evenly_spaced(len(self.listing), self.held_out_share)
        if not kept_back.any():
            raise ValueError(f"data.held_out_share={self.held_out_share} keeps none of {len(self.listing)} images back")
        self.selection_listing = self.listing.subset(np.flatnonzero(kept_back))
        self.listing = self.listing.subset(np.flatnonzero(~kept_back))
        self.annotations = self.dataset.annotations(self.split, self.listing)

    def train_dataloader(self) -> DataLoader[Any]:
        pairs = SearchedImages(
            self.listing, self.annotations, self.words, self.captions_per_image, **self.options(training=True)
        )
        return self.training_loader(pairs, collate_fn=self.collate)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        listing = self.selection_listing
        images = ImageItems(listing, **self.options(training=False))
        captions = CaptionRows(self.dataset.annotations(self.split, listing).captions, self.words)
        return [*self.gallery(images, captions, "selection"), *super().test_dataloader()]
