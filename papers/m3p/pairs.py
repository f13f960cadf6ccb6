"""Pairs of images and captions: the candidates for each image and caption, as samples and batches ([6.2] and [9])."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.item_dataset import Item, Sample
from common.data.media import MediaError
from common.data.regions import Regions
from papers.m3p.captions import CaptionPool, CaptionTokens, Tokens, forced_captions, pad_captions
from papers.m3p.code_switching import CodeSwitcher
from papers.m3p.images import RegionItems, pad_regions
from papers.m3p.masking import NO_LABEL, REGION_NOISE, WORD_NOISE, Ints, Masking, mask_regions, mask_words

#: Maximum draws per candidate before an item fails; a draw may be the true pair, repeated or unreadable.
ATTEMPTS = 100


@dataclass(frozen=True, eq=False)
class PairGroup:
    """The candidates for one image or caption; for in-batch matching, a single true pair.

    Args:
        captions, images: pieces and regions; one caption and N images, N captions and one image, or one of each.
        positive: position of the true pair.
        noise: random numbers for masking: `text` [N], `words` [N, tokens, 3], `regions` [N, regions, 2]. Empty without
            masking.
        image_group: images with the same number show the same thing.
    """

    captions: list[Tokens]
    images: list[Regions]
    positive: int
    noise: Mapping[str, npt.NDArray[np.float64]]
    image_group: int = 0

    def __len__(self) -> int:
        return max(len(self.captions), len(self.images))


# -- candidates --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Draws N images for every caption (`t2i`) and N captions for every image (`i2t`) from the whole set.

    Other captions of the image, and captions of images that show the same thing, also match, so they are never
    negatives. The released pre-training code only excludes the caption itself. Row g * N + n of a batch is pair n of
    group g.

    Source: [6.2] and [9].
    """

    count: int

    def check(self, pairs: PairItems, world_size: int) -> None:
        most = len(pairs.pool) + 1 - int(np.bincount(pairs.pool.groups).max())
        if not 2 <= self.count <= most:
            listing = pairs.listing
            raise ValueError(
                f"data.candidates is {self.count}, but must be from 2 to {most}: {listing.name}, {listing.version}, "
                f"has {len(pairs.pool)} images; or set data.vlm_candidates to in_batch"
            )

    def draw(self, pairs: PairItems, image: int, caption: int, rng: np.random.Generator) -> dict[str, PairGroup]:
        regions = pairs.regions(image)
        # Draw the random numbers in this order: images for the caption, then captions for the image.
        positive = int(rng.integers(self.count))
        images = list(islice(self._readable(pairs, image, rng), self.count - 1))
        images.insert(positive, regions)
        noise = pairs.noise(self.count, rng)
        t2i = PairGroup([pairs.pieces(caption, rng)], images, positive, noise)
        positive = int(rng.integers(self.count))
        others = [other for _, other in islice(self.negatives(pairs, image, rng), self.count - 1)]
        noise = pairs.noise(self.count, rng)
        captions = [pairs.pieces(number, rng) for number in [*others, caption]]
        captions.insert(positive, captions.pop())
        return {"t2i": t2i, "i2t": PairGroup(captions, [regions], positive, noise)}

    def negatives(self, pairs: PairItems, image: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Yield random other images, each at most once, with one of the image's captions."""
        pool, drawn = pairs.pool, set[int]()
        for _ in range(ATTEMPTS * self.count):
            other = int(rng.integers(len(pool)))
            captions = pool.of(other)
            number = int(captions[int(rng.random() * len(captions))])
            if other not in drawn and pool.groups[other] != pool.groups[image]:
                drawn.add(other)
                yield other, number
        raise MediaError(f"{pairs.listing.name}: too few usable images to draw negatives from")

    def _readable(self, pairs: PairItems, image: int, rng: np.random.Generator) -> Iterator[Regions]:
        """Yield the regions of negative images. Skip and count unreadable images."""
        for other, _ in self.negatives(pairs, image, rng):
            try:
                yield pairs.regions(other)
            except MediaError as error:
                pairs.skipped.record(other, error)

    def rows(self, groups: Sequence[PairGroup]) -> dict[str, Ints]:
        """Return the rows [G] of the true pairs, and the rows [G] of one false pair per group."""
        positive = np.array([group.positive for group in groups])
        first = np.arange(len(groups)) * self.count
        return {"true": first + positive, "false": first + (positive + 1) % self.count}


@dataclass(frozen=True)
class InBatch:
    """Compares all images and captions of a batch of B true pairs. Only the miniature uses this class ([13.2]).

    Pair i * B + j has image i and caption j. Pairs with the same number in `group` [B] aren't negatives of each other.
    """

    def check(self, pairs: PairItems, world_size: int) -> None:
        if world_size > 1:
            raise ValueError(
                "trainer.devices: data.vlm_candidates in_batch compares all pairs of a batch on one device; "
                "use one device, or set data.vlm_candidates to groups"
            )

    def draw(self, pairs: PairItems, image: int, caption: int, rng: np.random.Generator) -> dict[str, PairGroup]:
        regions = pairs.regions(image)
        pieces, noise = [pairs.pieces(caption, rng)], pairs.noise(1, rng)
        return {"in_batch": PairGroup(pieces, [regions], 0, noise, int(pairs.pool.groups[image]))}

    def rows(self, groups: Sequence[PairGroup]) -> dict[str, Ints]:
        """Return the rows [B] of the true pairs and of one false pair per image, and `group`.

        A false pair has the next caption of another group or, if all captions have the same group, the next caption.
        """
        group, size = np.array([group.image_group for group in groups]), len(groups)
        number = np.arange(size)
        distance = (number[None, :] - number[:, None]) % size
        distance[group[:, None] == group[None, :]] = size
        other = np.where((distance < size).any(1), distance.argmin(1), (number + 1) % size)
        return {"group": group, "true": number * (size + 1), "false": number * size + other}


Candidates = Groups | InBatch


# -- samples and batches -----------------------------------------------------------------------------------------------


class PairItems(RegionItems):
    """One caption of each image per pass, with candidates. A sample has a `PairGroup` of each kind.

    A sample contains its random numbers; masking and padding act on a whole batch.

    Args:
        captions_per_image: captions per image and epoch. Captions repeat if an image has fewer.
        masking: None masks nothing.
        switcher: translates words of captions.
        options: see `RegionItems`.
    """

    def __init__(
        self,
        captions: Sequence[CaptionTokens],
        candidates: Candidates,
        captions_per_image: int,
        masking: Masking | None,
        switcher: CodeSwitcher | None,
        **options: Any,
    ) -> None:
        super().__init__(captions, passes=captions_per_image, **options)
        self.pool = CaptionPool(captions, self.keys)
        self.candidates = candidates
        self.masking = masking
        self.switcher = switcher
        self.tokenizer = captions[0].tokenizer
        self.max_pieces = self.tokenizer.max_tokens - 2  # without boundary tokens

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        return self.candidates.draw(self, item.file, self._caption(item), rng)

    def _caption(self, item: Item) -> int:
        """Return the number of the caption for an item. An image has `captions_per_image` items (slots) per epoch."""
        captions = self.pool.of(item.file)
        if len(captions) == self.passes == 1:
            return int(captions[0])
        # Use the same seed for all slots of an image in an epoch, so that they show different captions.
        rng = np.random.default_rng((self.seed, item.epoch, item.file, self.passes))
        return int(captions[forced_captions(len(captions), self.passes, rng)[item.slot]])

    def pieces(self, caption: int, rng: np.random.Generator) -> Tokens:
        """Return the tokens of a caption, with code-switching if there is a switcher."""
        tokens, row = self.pool.caption(caption)
        pieces = tokens.pieces(row)
        if self.switcher is not None and tokens.captions.language == self.switcher.source:
            text = self.switcher.switch(tokens.texts[row], rng)
            pieces = np.array(self.tokenizer.pieces([text])[0], dtype=np.int64)
        return pieces[: self.max_pieces]

    def noise(self, pairs: int, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float64]]:
        """Draw the random numbers for masking some pairs."""
        if self.masking is None:
            return {}
        return {
            "text": rng.random(pairs),
            "words": rng.random((pairs, self.max_pieces + 2, WORD_NOISE)),
            "regions": rng.random((pairs, self.max_regions, REGION_NOISE)),
        }

    def step(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Make a training step from samples, in the form of `MultitaskSteps`."""
        index = torch.tensor([int(sample["index"]) for sample in samples])
        return {"xmlm": [], "relations": [self.collate(samples)], "index": index}

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Make a batch of each kind in the samples, and mask it.

        Returns:
            `tokens` int64 [P, L], padded at the end, and `token_mask` bool [P, L]; `regions` float32 [P, R, F], of
            length 1 or 0, `boxes` float32 [P, R, 5] and `region_mask` bool [P, R]; rows of pairs, see
            `Candidates.rows`. Masking adds what to predict of the true pairs: the places [K] of words or regions in the
            G joined sequences of length R + L, and `word_targets`, or `region_classes`, `region_features` and possibly
            `region_distributions`.
        """
        kinds = [kind for kind, group in samples[0].items() if isinstance(group, PairGroup)]
        return {kind: self._join([sample[kind] for sample in samples]) for kind in kinds}

    def _join(self, groups: Sequence[PairGroup]) -> dict[str, Tensor]:
        pairs = len(groups) * len(groups[0])
        tokens = pad_captions([pieces for group in groups for pieces in group.captions], self.tokenizer).numpy()
        regions = pad_regions([image for group in groups for image in group.images], self.max_regions)
        # Repeat a group's single caption or image for each of its pairs.
        tokens = np.repeat(tokens, pairs // len(tokens), axis=0)
        regions = {name: np.repeat(rows, pairs // len(rows), axis=0) for name, rows in regions.items()}
        columns: dict[str, npt.NDArray[Any]] = {
            "tokens": tokens,
            "token_mask": tokens != self.tokenizer.pad_id,
            "regions": regions["regions"],
            "boxes": regions["boxes"],
            "region_mask": regions["region_mask"],
            **self.candidates.rows(groups),
        }
        if self.masking is not None:
            columns |= self._masked(groups, tokens, regions, self.masking)
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _masked(
        self,
        groups: Sequence[PairGroup],
        tokens: Ints,
        regions: Mapping[str, npt.NDArray[Any]],
        masking: Masking,
    ) -> dict[str, npt.NDArray[Any]]:
        """Return masked tokens and regions, and what to predict: places in the true pairs' sequences, and targets."""
        noise = {name: np.concatenate([group.noise[name] for group in groups]) for name in groups[0].noise}
        masked_tokens, words = mask_words(
            tokens,
            tokens > self.tokenizer.end_id,  # neither boundary tokens nor padding
            noise["words"][:, : tokens.shape[1]],
            self.tokenizer.mask_id,
            self.tokenizer.vocabulary_size,
            masking,
        )
        zeroed, classes = mask_regions(regions["classes"], regions["region_mask"], noise["regions"], masking)
        # A pair has either masked words or masked regions; only true pairs are predicted.
        masks_words = noise["text"] < masking.text_fraction
        true = np.arange(len(groups)) * len(groups[0]) + [group.positive for group in groups]
        word_row, word = np.nonzero((words[true] != NO_LABEL) & masks_words[true, None])
        region_row, region = np.nonzero((classes[true] != NO_LABEL) & ~masks_words[true, None])
        length = self.max_regions + tokens.shape[1]
        columns = {
            "tokens": np.where(masks_words[:, None], masked_tokens, tokens),
            "regions": np.where((zeroed & ~masks_words[:, None])[:, :, None], np.float32(0), regions["regions"]),
            "word_places": word_row * length + self.max_regions + word,
            "word_targets": words[true[word_row], word],
            "region_places": region_row * length + region,
            "region_classes": classes[true[region_row], region],
            "region_features": regions["features"][true[region_row], region],
        }
        if "distribution" in regions:
            columns["region_distributions"] = regions["distribution"][true[region_row], region]
        return columns
