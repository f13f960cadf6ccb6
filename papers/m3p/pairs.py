"""Pairs of image and caption, groups of candidates, and batches of both.

A sample holds its random numbers; masking, padding and normalizing act on a whole batch ([6.2] and [9]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.item_dataset import Key, Sample
from common.data.media import MediaError
from common.data.text import XLMRTokenizer
from papers.m3p.captions import CaptionPool, SwitchedCaptions, Tokens, forced_captions, pad_captions
from papers.m3p.masking import NO_LABEL, REGION_NOISE, WORD_NOISE, Masking, mask_regions, mask_words
from papers.m3p.pictures import Pictures, RegionArrays, RegionItems, pad_regions, unit_length

#: `groups`: N candidates for every image and caption; `in_batch`: the other pairs of the batch.
Candidates = Literal["groups", "in_batch"]
#: Replacements tried for an unreadable picture before the item fails.
ATTEMPTS = 100


@dataclass(frozen=True, eq=False)
class PairGroup:
    """Candidates of one image or caption, or a single true pair.

    Args:
        captions, images: pieces, regions of one, or of N.
        languages: language number of each caption before code-switching.
        noise: random numbers for masking: `text` [N], `words` [N, tokens, 3], `regions` [N, regions, 2]; may be empty.
    """

    captions: list[Tokens]
    languages: list[int]
    images: list[RegionArrays]
    positive: int
    noise: Mapping[str, npt.NDArray[np.float64]]

    def __len__(self) -> int:
        return max(len(self.captions), len(self.images))


class PairItems(RegionItems):
    """Captions and images to match ([6.2] and [9]).

    An item is an image with one of its captions. It becomes two groups of N pairs, each with one true pair: `t2i`, the
    caption and N images, and `i2t`, the image and N captions; for in-batch candidates it becomes the pair `in_batch`.
    An epoch shows an image `captions_per_image` times with newly drawn captions. Negatives are drawn uniformly from the
    other images without replacement.

    Args:
        pool: captions in the order of `pictures`.
        tokenizer: its `max_tokens` cuts captions.
        languages: in the order of their numbers; captions in other languages get number 0.
        captions_per_image: per epoch; repeats captions of an image with fewer.
        exclude_siblings: never use other captions of an image, or other images of its group, as negatives, because they
            match too. The released pre-training code only excludes the caption itself.
    """

    def __init__(
        self,
        pictures: Pictures,
        pool: CaptionPool,
        tokenizer: XLMRTokenizer,
        languages: Sequence[str] = (),
        captions_per_image: int = 1,
        candidates: int = 4,
        vlm_candidates: Candidates = "groups",
        exclude_siblings: bool = True,
        switched: SwitchedCaptions | None = None,
        masked: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(pictures, passes=captions_per_image, **options)
        self.pool = pool
        self.numbers = {language: number for number, language in enumerate(languages)}
        self.max_pieces = tokenizer.max_tokens - 2
        self.candidates = candidates
        self.vlm_candidates: Candidates = vlm_candidates
        self.exclude_siblings = exclude_siblings
        self.switched = switched
        self.masked = masked
        others = len(pool) - (int(np.bincount(pool.groups).max()) if exclude_siblings else 1)
        if vlm_candidates == "groups" and not 2 <= candidates <= others + 1:
            raise ValueError(
                f"data.candidates is {candidates}, but must be from 2 to {others + 1}: {pictures.name} has {len(pool)} "
                f"images, and for one of them {others} that are no siblings"
            )

    def __getitem__(self, key: Key) -> Sample:
        epoch, item = key if isinstance(key, tuple) else (0, key)
        slot = range(len(self))[item] // len(self.listing)
        return self._usable(key, lambda file, rng: self._pair(file, slot, epoch, rng))

    def _pair(self, file: int, slot: int, epoch: int, rng: np.random.Generator) -> Sample:
        regions = self.regions(file)
        caption = self._chosen(file, slot, epoch)
        if self.vlm_candidates == "in_batch":
            return {
                "in_batch": PairGroup(*self._texts([caption], rng), [regions], 0, self._noise(1, rng)),
                "group": torch.tensor(int(self.pool.groups[file])),
            }
        # Order of the random numbers: images for the caption, then captions for the image.
        positive = int(rng.integers(self.candidates))
        images = [image for _, _, image in self._negatives(file, caption, True, rng) if image is not None]
        images.insert(positive, regions)
        noise = self._noise(self.candidates, rng)
        t2i = PairGroup(*self._texts([caption], rng), images, positive, noise)
        positive = int(rng.integers(self.candidates))
        others = [number for _, number, _ in self._negatives(file, caption, False, rng)]
        noise = self._noise(self.candidates, rng)
        texts, languages = self._texts([*others, caption], rng)
        texts.insert(positive, texts.pop())
        languages.insert(positive, languages.pop())
        return {"t2i": t2i, "i2t": PairGroup(texts, languages, [regions], positive, noise)}

    def _texts(self, captions: Sequence[int], rng: np.random.Generator) -> tuple[list[Tokens], list[int]]:
        languages = [self.numbers.get(self.pool.caption(number)[0].language, 0) for number in captions]
        return [self._pieces(number, rng) for number in captions], languages

    def _chosen(self, file: int, slot: int, epoch: int) -> int:
        """Number of the caption that an epoch shows in a slot, one of `captions_per_image`."""
        captions = self.pool.of(file)
        if len(captions) == self.passes == 1:
            return int(captions[0])
        # The same seed for all slots of an image in an epoch, so they show different captions.
        rng = np.random.default_rng((self.seed, epoch, file, self.passes))
        return int(captions[forced_captions(len(captions), self.passes, rng)[slot]])

    def read(self, key: tuple[int, int]) -> tuple[str, str, Tokens]:
        """An item's language, original caption, and pieces as training reads them."""
        epoch, item = key
        sample = self[key]
        tokens, number = self.pool.caption(self._chosen(int(sample["index"]), item // len(self.listing), epoch))
        group: PairGroup = sample["in_batch" if self.vlm_candidates == "in_batch" else "t2i"]
        return tokens.language, tokens.texts[number], group.captions[0]

    def _pieces(self, number: int, rng: np.random.Generator) -> Tokens:
        tokens, row = self.pool.caption(number)
        pieces: Tokens | None = None
        if self.switched is not None and tokens.language == self.switched.switcher.source:
            pieces = self.switched.pieces(tokens.texts[row], rng)
        return (tokens.pieces(row) if pieces is None else pieces)[: self.max_pieces]

    def _negatives(
        self, file: int, caption: int, read: bool, rng: np.random.Generator
    ) -> list[tuple[int, int, RegionArrays | None]]:
        """Other images, each with a caption number and, if `read`, its regions; replaces and counts unreadable ones."""
        negatives: dict[int, tuple[int, RegionArrays | None]] = {}
        error: MediaError | None = None
        for _ in range(ATTEMPTS * self.candidates):
            other = int(rng.integers(len(self.pool)))
            theirs = self.pool.of(other)
            number = int(theirs[int(rng.random() * len(theirs))])
            sibling = self.exclude_siblings and self.pool.groups[other] == self.pool.groups[file]
            if other in negatives or number == caption or sibling:
                continue
            try:
                negatives[other] = (number, self.regions(other) if read else None)
            except MediaError as problem:
                error = problem
                self.skipped.record(other, problem)
            if len(negatives) == self.candidates - 1:
                return [(image, *drawn) for image, drawn in negatives.items()]
        raise error or MediaError(f"{self.pictures.name}: too few images that can be used to draw negatives from")

    def _noise(self, count: int, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float64]]:
        if not self.masked:
            return {}
        return {
            "text": rng.random(count),
            "words": rng.random((count, self.max_pieces + 2, WORD_NOISE)),
            "regions": rng.random((count, self.max_regions, REGION_NOISE)),
        }


class PairCollator:
    """Batches samples of `PairItems` with at least `max_regions` region rows; without `masking` it masks nothing."""

    def __init__(self, tokenizer: XLMRTokenizer, masking: Masking | None, max_regions: int = 0) -> None:
        self.tokenizer = tokenizer
        self.masking = masking
        self.max_regions = max_regions

    def __call__(self, samples: Sequence[Sample]) -> dict[str, dict[str, Tensor]]:
        """A batch for each kind of group in the samples; row g * N + n is pair n of group g.

        Returns:
            `tokens` int64 [P, L], padded at the end, `token_mask` bool [P, L], and `languages` int64 [P]; `regions`
            float32 [P, R, F], of length 1 or 0, `boxes` float32 [P, R, 5] and `region_mask` bool [P, R]; `positive`
            int64 [G], or `group` int64 [P] for in-batch pairs. With masking: `word_labels` int64 [P, L] and
            `region_labels` int64 [P, R], -1 at unmasked places and in false pairs; `region_targets` float32 [K, F], the
            detector's features of the K labeled regions in row order, and `region_distributions` [K, C] if available.
        """
        batch: dict[str, dict[str, Tensor]] = {}
        for kind in ("t2i", "i2t", "in_batch"):
            if kind not in samples[0]:
                continue
            groups: list[PairGroup] = [sample[kind] for sample in samples]
            batch[kind] = self._join(groups)
            if kind == "in_batch":
                batch[kind]["group"] = torch.stack([sample["group"] for sample in samples])
            else:
                batch[kind]["positive"] = torch.tensor([group.positive for group in groups])
        return batch

    def _join(self, groups: Sequence[PairGroup]) -> dict[str, Tensor]:
        candidates = len(groups[0])
        captions = [caption for group in groups for caption in group.captions]
        images = [image for group in groups for image in group.images]
        tokens, lengths = pad_captions(captions, self.tokenizer)
        languages = np.array([number for group in groups for number in group.languages], dtype=np.int64)
        regions = pad_regions(images, self.max_regions)
        # A group's single caption or image is repeated for each of its pairs.
        if len(captions) < len(groups) * candidates:
            tokens, lengths, languages = (np.repeat(rows, candidates, axis=0) for rows in (tokens, lengths, languages))
        if len(images) < len(groups) * candidates:
            regions = {name: np.repeat(rows, candidates, axis=0) for name, rows in regions.items()}
        features = regions["features"]
        labels: dict[str, npt.NDArray[Any]] = {}
        if self.masking is not None:
            tokens, features, labels = self._mask(groups, tokens, lengths, regions, self.masking)
        columns = {
            "tokens": tokens,
            "token_mask": np.arange(tokens.shape[1]) < lengths[:, None] + 2,
            "languages": languages,
            "regions": unit_length(features),
            "boxes": regions["boxes"],
            "region_mask": regions["mask"],
            **labels,
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _mask(
        self,
        groups: Sequence[PairGroup],
        tokens: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        regions: dict[str, npt.NDArray[Any]],
        masking: Masking,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], dict[str, npt.NDArray[Any]]]:
        noise = {name: np.concatenate([group.noise[name] for group in groups]) for name in groups[0].noise}
        position = np.arange(tokens.shape[1])
        masked_tokens, word_labels = mask_words(
            tokens,
            (position > 0) & (position <= lengths[:, None]),
            noise["words"][:, : tokens.shape[1]],
            self.tokenizer.mask_id,
            self.tokenizer.vocabulary_size,
            masking,
        )
        features = regions["features"]
        zeroed, region_labels = mask_regions(
            regions["classes"], regions["mask"], noise["regions"][:, : features.shape[1]], masking
        )
        # A pair has masked words or masked regions, never both; only true pairs are predicted.
        masks_words = noise["text"] < masking.text_fraction
        true = np.zeros(len(groups) * len(groups[0]), dtype=np.bool_)
        true[np.arange(len(groups)) * len(groups[0]) + [group.positive for group in groups]] = True
        region_labels[masks_words | ~true] = NO_LABEL
        labeled = region_labels != NO_LABEL
        labels = {
            "word_labels": np.where((masks_words & true)[:, None], word_labels, NO_LABEL),
            "region_labels": region_labels,
            "region_targets": features[labeled],
        }
        if "distribution" in regions:
            labels["region_distributions"] = regions["distribution"][labeled]
        tokens = np.where(masks_words[:, None], masked_tokens, tokens)
        features = np.where((zeroed & ~masks_words[:, None])[:, :, None], np.float32(0), features)
        return tokens, features, labels
