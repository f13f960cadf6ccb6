"""The sets that a test searches in: every image by its captions, and every caption by its image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data.images import ImageError, read_image
from common.data.item_dataset import Sample
from common.data.text import XLMRTokenizer
from common.training.data_module import Collate
from papers.m3p.captions import CaptionReader, CaptionTokens, pad_captions
from papers.m3p.pictures import CaptionSet, Pictures, RegionItems, find_pictures, region_batch


@dataclass(frozen=True)
class EvaluationSet:
    """A language of a test set.

    Args:
        name: of the set, as the configuration has it.
        language: of its captions.
        image_loader, caption_loader: positions in the list of test loaders; sets may share the images.
    """

    name: str
    language: str
    image_loader: int
    caption_loader: int


class CaptionItems(Dataset[Sample]):
    """Captions to be found, each with the image that it describes.

    Args:
        tokens: all captions of the set.
        pictures: the images that are searched; captions of others are left out.
        first: the first so many captions of each image; None for all.
        tokenizer: whose `max_tokens` cuts them.
        cut: whether they are cut at all; the released code cuts those of training alone.
    """

    def __init__(
        self, tokens: CaptionTokens, pictures: Pictures, first: int | None, tokenizer: XLMRTokenizer, cut: bool = False
    ) -> None:
        self.tokens = tokens
        self.tokenizer = tokenizer
        longest = tokens.longest() + 2
        self.width = min(longest, tokenizer.max_tokens) if cut else longest
        image_of = {key: image for image, key in enumerate(pictures.keys)}
        starts = tokens.captions.captions.starts.tolist()
        chosen = [
            (number, image_of[key])
            for row, key in enumerate(tokens.captions.keys)
            if key in image_of
            for number in range(starts[row], starts[row + 1])[:first]
        ]
        #: Numbers of the captions in their set, and positions of their images.
        self.numbers, self.images = np.array(chosen, dtype=np.int64).reshape(-1, 2).T

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> Sample:
        return {
            "pieces": self.tokens.pieces(int(self.numbers[item]))[: self.width - 2],
            "index": item,
            "image_index": int(self.images[item]),
        }

    def text(self, item: int) -> str:
        """A caption as it stands in its file."""
        return self.tokens.texts[int(self.numbers[item])]

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A batch of captions: `tokens` and `token_mask` [B, W], W the same for all, `index` and `image_index` [B]."""
        tokens, lengths = pad_captions([sample["pieces"] for sample in samples], self.tokenizer, self.width)
        return {
            "tokens": torch.from_numpy(tokens),
            "token_mask": torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None] + 2),
            "index": torch.tensor([sample["index"] for sample in samples]),
            "image_index": torch.tensor([sample["image_index"] for sample in samples]),
        }


def collate_regions(samples: Sequence[Sample], max_regions: int) -> dict[str, Tensor]:
    """A batch of pictures: `regions` [B, R, F], `boxes` [B, R, 5], `region_mask` [B, R], `index` and `skipped` [B]."""
    return region_batch([sample["regions"] for sample in samples], max_regions) | {
        name: torch.stack([sample[name] for sample in samples]) for name in ("index", "skipped")
    }


class SearchedSets:
    """Sets of captioned images to search in, and what each test loader reads; equal images are read once.

    Args:
        sets: the sets by name.
        split: of each.
        captions: reads their captions.
        images, captions_per_image: the first so many images of a set, and captions of each image; None for all.
        max_missing: fraction of the images that may have no regions.
        cut: whether captions are cut to what the tokenizer cuts those of training to.
        options: see RegionItems.

    Attributes:
        sets: what is searched.
        items: of each loader, images or captions.
        longest: tokens of the longest caption, 0 without any.
    """

    def __init__(
        self,
        sets: Mapping[str, CaptionSet],
        split: str,
        captions: CaptionReader,
        images: int | None = None,
        captions_per_image: int | None = None,
        max_missing: float = 0.0,
        cut: bool = False,
        **options: Any,
    ) -> None:
        self.split = split
        self.sets: list[EvaluationSet] = []
        self.items: list[RegionItems | CaptionItems] = []
        self._datasets = [one.dataset for one in sets.values()]
        loader_of: dict[tuple[Any, ...], int] = {}
        for name, one in sets.items():
            dataset: Any = one.dataset
            pictures = find_pictures([one], split, captions, max_missing, images)
            key = (type(dataset), dataset.root, dataset.regions(split).paths, tuple(pictures.keys))
            if key not in loader_of:
                loader_of[key] = len(self.items)
                self.items.append(RegionItems(pictures, **options))
            tokens = captions(dataset, split, one.language)
            self.sets.append(EvaluationSet(name, one.language, loader_of[key], len(self.items)))
            self.items.append(CaptionItems(tokens, pictures, captions_per_image, captions.tokenizer, cut))
        self.longest = max((items.width for items in self.items if isinstance(items, CaptionItems)), default=0)

    def loaders(self) -> list[tuple[str, RegionItems | CaptionItems, Collate]]:
        """Name for the record, items and collate function of each loader."""
        names = {one.image_loader: f"test {one.name}" for one in reversed(self.sets)}
        names |= {one.caption_loader: f"test captions {one.name}" for one in self.sets}
        return [
            (
                names[number],
                items,
                items.collate
                if isinstance(items, CaptionItems)
                else partial(collate_regions, max_regions=items.max_regions),
            )
            for number, items in enumerate(self.items)
        ]

    def caption(self, position: int, caption: int) -> str:
        """A caption of a set, by its `index`."""
        items = self.items[self.sets[position].caption_loader]
        assert isinstance(items, CaptionItems)
        return items.text(caption)

    def picture(self, position: int, image: int) -> npt.NDArray[np.uint8] | None:
        """An image of a set, by its `index`, uint8 [H, W, 3]; None where only its regions are there."""
        items = self.items[self.sets[position].image_loader]
        assert isinstance(items, RegionItems)
        path = self._datasets[position].image_path(items.pictures.keys[image], self.split)
        try:
            return np.asarray(read_image(path))
        except ImageError:
            return None
