"""Images as regions, pairs of image and caption, groups of candidates, and batches of them.

A sample contains its random numbers; masking, padding and normalizing act on a whole batch ([6.2] and [9]).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.datasets.captioned import LanguageCaptioned
from common.data.item_dataset import Item, ItemDataset, Sample, TooManyBrokenFiles
from common.data.listing import UNLABELED, Listing, file_names
from common.data.media import MediaError
from common.data.regions import RegionError, RegionFeatures, Regions
from common.data.sequences import Texts
from common.data.text import XLMRTokenizer
from papers.m3p.candidates import KINDS, Candidates, PairGroup
from papers.m3p.captions import CaptionPool, CaptionTokens, Tokens, forced_captions, pad_captions
from papers.m3p.code_switching import CodeSwitcher
from papers.m3p.masking import NO_LABEL, REGION_NOISE, WORD_NOISE, Ints, Masking, mask_regions, mask_words


@dataclass
class LanguageSet:
    """Captioned images in one language; a pre-training epoch shows `captions_per_image` captions of each image."""

    dataset: LanguageCaptioned
    language: str = "en"
    captions_per_image: int = 1


# -- images ------------------------------------------------------------------------------------------------------------


def find_images(
    sets: Sequence[LanguageSet],
    captions: Sequence[CaptionTokens],
    split: str,
    max_missing: float,
    first: int | None = None,
) -> tuple[Listing, Sequence[str], RegionFeatures]:
    """Find the images of some sets that have captions and regions. Return listing, keys, and features by key.

    Read only the `first` images, and accept up to a fraction `max_missing` of images without regions. Sets share the
    images with the same key. A set with its own split of COCO's images (COCO-CN) adds captions to COCO, but no images,
    because some of its training images are COCO's test images. The released code also pools 113,287 images of COCO [9].
    """
    datasets: list[Any] = [captioned.dataset for captioned in sets]
    paths = tuple(dict.fromkeys(path for dataset in datasets for path in dataset.region_paths(split)))
    features = datasets[0].regions(split)
    if paths != features.paths:
        features = RegionFeatures(paths, datasets[0].region_keys)
    sources = [getattr(dataset, "coco", dataset).name for dataset in datasets]
    whole = {source for source, dataset in zip(sources, datasets) if not dataset.own_splits}
    adding = [
        tokens.captions.keys
        for source, dataset, tokens in zip(sources, datasets, captions)
        if not (dataset.own_splits and source in whole)
    ]
    # Keep the `keys` object of a single set, which makes later comparisons fast.
    keys: Sequence[str] = adding[0] if len(adding) == 1 else list(dict.fromkeys(key for keys in adding for key in keys))
    keys = keys[:first] if first is not None and first < len(keys) else keys
    total, missing = len(keys), features.missing(keys)
    if missing:
        lacking = set(missing)
        keys = Texts(key for key in keys if key not in lacking)
    name = "+".join(dict.fromkeys(dataset.name for dataset in datasets))
    if len(missing) > max_missing * total or not len(keys):
        raise TooManyBrokenFiles(
            f"{name}, {split}: {len(missing)} of {total} images have no region features in "
            f"{', '.join(map(str, paths))}, more than {100 * max_missing:g} %; first {', '.join(missing[:5])}. Extract "
            "them, or for training raise data.max_skipped_fraction"
        )
    languages = ",".join(dict.fromkeys(captioned.language for captioned in sets))
    listing = Listing(
        name, f"{split}; {languages}", datasets[0].root, (), file_names(keys), np.full(len(keys), UNLABELED),
        missing=len(missing), missing_names=tuple(missing[:20]),
    )  # fmt: skip
    return listing, keys, features


class RegionItems(ItemDataset):
    """Images as regions, for evaluation: `regions` and `index`. Caches all images if `cache_bytes` is large enough."""

    def __init__(
        self,
        listing: Listing,
        keys: Sequence[str],
        features: RegionFeatures,
        max_regions: int,
        cache_bytes: int = 0,
        distributions: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.keys = keys
        self.features = features
        self.max_regions = max_regions
        self.distributions = distributions
        numbers = len(keys) * max_regions * (features.feature_size + 7)
        self._cache: dict[int, Regions] | None = {} if numbers * 4 <= cache_bytes else None

    def regions(self, image: int) -> Regions:
        if self._cache is not None and image in self._cache:
            return self._cache[image]
        key = self.keys[image]
        try:
            stored = self.features[key]
        except RegionError as error:
            raise MediaError(f"{self.listing.name}, picture {key}: {error}") from error
        if self.distributions and stored.distribution is None:
            raise ValueError(
                f"{self.listing.name}: data.distributions is true, but the region features have no `distribution`; "
                "extract them with it, or set data.distributions to false"
            )
        regions = stored.first(self.max_regions, self.distributions)
        if self._cache is not None:
            self._cache[image] = regions
        return regions

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        return {"regions": self.regions(item.file)}

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Make a batch of images: the fields that `region_batch` returns, and `index` [B]."""
        index = torch.stack([sample["index"] for sample in samples])
        return region_batch([sample["regions"] for sample in samples], self.max_regions) | {"index": index}

    def fill_cache(self) -> None:
        if self._cache is not None:
            for file in range(len(self.listing)):
                with contextlib.suppress(MediaError):  # `read` raises the error again and counts it
                    self.regions(file)

    def preview(self, item: int) -> npt.NDArray[np.uint8]:
        raise ValueError("region features hold no picture")


def pad_regions(images: Sequence[Regions], rows: int) -> dict[str, npt.NDArray[Any]]:
    """Stack the regions of several images, padded with zeros to `rows` each.

    Text starts after the last region row. Its position affects the encoder's output, so it must not depend on the other
    images of a batch, process or data set.

    Returns:
        `features` float32 [P, R, F], `boxes` float32 [P, R, 5], `classes` int64 [P, R], `mask` bool [P, R], and
        `distribution` float32 [P, R, C] if the images have it.
    """
    mask = np.arange(rows) < np.array([len(image) for image in images])[:, None]
    columns: dict[str, npt.NDArray[Any]] = {"mask": mask}
    for name, of in (
        ("features", "features"), ("boxes", "box_vectors"), ("classes", "labels"), ("distribution", "distribution")
    ):  # fmt: skip
        parts = [getattr(image, of) for image in images]
        if parts[0] is not None:
            columns[name] = np.zeros((*mask.shape, *parts[0].shape[1:]), dtype=parts[0].dtype)
            columns[name][mask] = np.concatenate(parts)
    return columns


def unit_length(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale vectors to length 1; zero vectors stay zero."""
    lengths = np.sqrt(np.einsum("...f,...f->...", features, features))[..., None]
    return features / np.maximum(lengths, np.float32(1e-12))


def region_batch(images: Sequence[Regions], rows: int) -> dict[str, Tensor]:
    """Turn images into encoder inputs: `regions` [B, R, F], `boxes` [B, R, 5] and `region_mask` bool [B, R]."""
    columns = pad_regions(images, rows)
    return {
        "regions": torch.from_numpy(unit_length(columns["features"])),
        "boxes": torch.from_numpy(columns["boxes"]),
        "region_mask": torch.from_numpy(columns["mask"]),
    }


# -- pairs -------------------------------------------------------------------------------------------------------------


class PairItems(RegionItems):
    """One caption of each image per pass, with candidates. A sample has a `PairGroup` of each kind.

    Args:
        pool: the captions, in the order of the images.
        max_pieces: longest caption, without boundary tokens.
        captions_per_image: captions per image and epoch. Captions repeat if an image has fewer.
        masked: whether to draw the random numbers for masking.
        switcher: translates words of captions.
        options: see `RegionItems`.
    """

    def __init__(
        self,
        pool: CaptionPool,
        candidates: Candidates,
        max_pieces: int,
        captions_per_image: int,
        masked: bool,
        switcher: CodeSwitcher | None,
        **options: Any,
    ) -> None:
        super().__init__(passes=captions_per_image, **options)
        self.pool = pool
        self.candidates = candidates
        self.max_pieces = max_pieces
        self.masked = masked
        self.switcher = switcher

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
            pieces = np.array(tokens.tokenizer.pieces([text])[0], dtype=np.int64)
        return pieces[: self.max_pieces]

    def noise(self, pairs: int, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float64]]:
        """Draw the random numbers for masking some pairs."""
        if not self.masked:
            return {}
        return {
            "text": rng.random(pairs),
            "words": rng.random((pairs, self.max_pieces + 2, WORD_NOISE)),
            "regions": rng.random((pairs, self.max_regions, REGION_NOISE)),
        }


@dataclass
class PairCollator:
    """Makes batches of `PairItems` samples with `max_regions` region rows, and masks them if `masking` is set."""

    tokenizer: XLMRTokenizer
    masking: Masking | None
    max_regions: int

    def step(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Make a training step from samples, in the form of `MultitaskSteps`."""
        index = torch.tensor([int(sample["index"]) for sample in samples])
        return {"xmlm": [], "relations": [self(samples)], "index": index}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, dict[str, Tensor]]:
        """Make a batch of each kind in the samples. `Candidates.joined` combines the images and captions to pairs.

        Returns:
            `tokens` int64 [P, L], padded at the end, and `token_mask` bool [P, L]; `regions` float32 [P, R, F], of
            length 1 or 0, `boxes` float32 [P, R, 5] and `region_mask` bool [P, R]; `positive` int64 [G], or `group`
            int64 [P] for in-batch pairs. Masking adds what to predict of the true pairs: the places [K] of words or
            regions in the G joined sequences of length R + L, and `word_targets`, or `region_classes`,
            `region_features` and possibly `region_distributions`.
        """
        batch: dict[str, dict[str, Tensor]] = {}
        for kind, candidates in KINDS.items():
            if kind in samples[0]:
                groups: list[PairGroup] = [sample[kind] for sample in samples]
                batch[kind] = self._join(groups) | candidates.targets(groups)
        return batch

    def _join(self, groups: Sequence[PairGroup]) -> dict[str, Tensor]:
        pairs = len(groups) * len(groups[0])
        tokens, lengths = pad_captions([caption for group in groups for caption in group.captions], self.tokenizer)
        regions = pad_regions([image for group in groups for image in group.images], self.max_regions)
        # Repeat a group's single caption or image for each of its pairs.
        tokens, lengths = (np.repeat(rows, pairs // len(rows), axis=0) for rows in (tokens, lengths))
        regions = {name: np.repeat(rows, pairs // len(rows), axis=0) for name, rows in regions.items()}
        columns: dict[str, npt.NDArray[Any]] = {
            "tokens": tokens,
            "token_mask": np.arange(tokens.shape[1]) < lengths[:, None] + 2,
            "regions": regions["features"],
            "boxes": regions["boxes"],
            "region_mask": regions["mask"],
        }
        if self.masking is not None:
            columns |= self._masked(groups, tokens, lengths, regions, self.masking)
        columns["regions"] = unit_length(columns["regions"])
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _masked(
        self,
        groups: Sequence[PairGroup],
        tokens: Ints,
        lengths: Ints,
        regions: Mapping[str, npt.NDArray[Any]],
        masking: Masking,
    ) -> dict[str, npt.NDArray[Any]]:
        """Return masked tokens and regions, and what to predict: places in the true pairs' sequences, and targets."""
        noise = {name: np.concatenate([group.noise[name] for group in groups]) for name in groups[0].noise}
        position = np.arange(tokens.shape[1])
        masked_tokens, words = mask_words(
            tokens,
            (position > 0) & (position <= lengths[:, None]),
            noise["words"][:, : tokens.shape[1]],
            self.tokenizer.mask_id,
            self.tokenizer.vocabulary_size,
            masking,
        )
        zeroed, classes = mask_regions(regions["classes"], regions["mask"], noise["regions"], masking)
        # A pair has either masked words or masked regions; only true pairs are predicted.
        masks_words = noise["text"] < masking.text_fraction
        true = np.arange(len(groups)) * len(groups[0]) + [group.positive for group in groups]
        word_row, word = np.nonzero((words[true] != NO_LABEL) & masks_words[true, None])
        region_row, region = np.nonzero((classes[true] != NO_LABEL) & ~masks_words[true, None])
        length = self.max_regions + tokens.shape[1]
        columns = {
            "tokens": np.where(masks_words[:, None], masked_tokens, tokens),
            "regions": np.where((zeroed & ~masks_words[:, None])[:, :, None], np.float32(0), regions["features"]),
            "word_places": word_row * length + self.max_regions + word,
            "word_targets": words[true[word_row], word],
            "region_places": region_row * length + region,
            "region_classes": classes[true[region_row], region],
            "region_features": regions["features"][true[region_row], region],
        }
        if "distribution" in regions:
            columns["region_distributions"] = regions["distribution"][true[region_row], region]
        return columns
