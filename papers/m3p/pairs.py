"""Pictures as regions and their captions as tokens: true pairs, groups of candidates, and batches of both.

A sample holds what chance decides about it as plain numbers; masking, padding and normalising happen to a whole batch
at once (specification 6.2 and 9).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data.annotations import LanguageCaptions
from common.data.images import ImageError, read_image
from common.data.items import ItemDataset, Key, Sample
from common.data.listing import ClipTable, Listing
from common.data.media import MediaError
from common.data.regions import RegionError, RegionFeatures
from common.data.text import XLMRTokenizer
from papers.m3p.code_switching import CodeSwitcher
from papers.m3p.masking import NO_LABEL, REGION_NOISE, WORD_NOISE, Masking, mask_regions, mask_words
from papers.m3p.streams import stream_tokens

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.integer[Any]]
#: `groups`, N candidates for every image and every caption; `in_batch`, those of the other pairs of the batch.
Candidates = Literal["groups", "in_batch"]
#: How often a picture that cannot be read is replaced by another candidate before the item is given up.
ATTEMPTS = 100


# -- captions ----------------------------------------------------------------------------------------------------------


class FlatTexts(Sequence[str]):
    """The captions of all images, one after the other."""

    def __init__(self, captions: LanguageCaptions) -> None:
        self.rows = captions.captions

    def __len__(self) -> int:
        return int(self.rows.starts[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.rows.value(place) for place in range(*index.indices(len(self)))]
        return self.rows.value(range(len(self))[index])


class CaptionTokens:
    """The pieces of all captions of a set in one language, made once.

    Args:
        captions: the captions.
        tokenizer: makes pieces of them.
    """

    def __init__(self, captions: LanguageCaptions, tokenizer: XLMRTokenizer) -> None:
        self.language = captions.language
        self.texts = FlatTexts(captions)
        self._tokens = stream_tokens(self.texts, tokenizer, captions.fingerprint())
        # No piece has the number of the closing token, which stands behind every caption.
        self._ends = np.flatnonzero(self._tokens == tokenizer.end_id)

    def __len__(self) -> int:
        return len(self.texts)

    def pieces(self, number: int) -> Tokens:
        """Pieces of a caption, without boundary tokens."""
        first = self._ends[number - 1] + 1 if number else 0
        return self._tokens[first : self._ends[number]]

    def longest(self) -> int:
        """Largest number of pieces."""
        return int(np.diff(self._ends, prepend=-1).max(initial=1)) - 1


class CaptionPool:
    """Images with their captions in one language or in several; those of an image are pooled.

    Args:
        sets: captions of each set, with what they became; images are the same where their keys are.
        keys: images to use, in this order; others and their captions are left out.

    Raises:
        ValueError: an image has no caption.
    """

    def __init__(self, sets: Sequence[tuple[LanguageCaptions, CaptionTokens]], keys: Sequence[str]) -> None:
        self.sets = [tokens for _, tokens in sets]
        self._bases = np.cumsum([0, *(len(tokens) for tokens in self.sets)])
        rows_of = [_rows(captions.keys, keys) for captions, _ in sets]
        image = np.concatenate(
            [np.repeat(rows, np.diff(captions.captions.starts)) for rows, (captions, _) in zip(rows_of, sets)]
        )
        kept = np.flatnonzero(image >= 0)
        self._captions = kept[np.argsort(image[kept], kind="stable")]
        self.counts = np.bincount(image[kept], minlength=len(keys))
        self._starts = np.cumsum([0, *self.counts])
        # Numbers of groups mean something within a set only: an image has that of the first set that holds it.
        groups = np.full((len(keys), 2), -1, dtype=np.int64)
        for number, (rows, (captions, _)) in enumerate(zip(rows_of, sets)):
            new = np.flatnonzero((rows >= 0) & (groups[rows, 0] < 0))
            groups[rows[new]] = np.stack([np.full(len(new), number), captions.groups[new]], axis=1)
        self.groups = np.unique(groups, axis=0, return_inverse=True)[1].reshape(-1)
        if not self.counts.all():
            raise ValueError(f"the image {keys[int(self.counts.argmin())]} has no caption")

    def __len__(self) -> int:
        return len(self.counts)

    def of(self, image: int) -> Ints:
        """Numbers of the captions of an image."""
        return self._captions[self._starts[image] : self._starts[image + 1]]

    def caption(self, number: int) -> tuple[CaptionTokens, int]:
        """The set that a caption is of, and its number there."""
        which = int(np.searchsorted(self._bases, number, side="right")) - 1
        return self.sets[which], number - int(self._bases[which])


def _rows(keys: Sequence[str], images: Sequence[str]) -> Ints:
    """Positions of some keys among those of the images; -1 for one that is not there."""
    if keys is images:
        return np.arange(len(keys))
    place = {key: row for row, key in enumerate(images)}
    return np.array([place.get(key, -1) for key in keys], dtype=np.int64)


def forced_captions(count: int, wanted: int, rng: np.random.Generator) -> Ints:
    """Exactly so many of an image's captions: cut in random order where there are more, repeated where there are fewer.

    Args:
        count: captions that the image has, at least 1.
        wanted: captions that are wanted.
        rng: source of the draws.

    Returns:
        Numbers from 0 to count - 1, int64 [wanted].

    Source: specification 8 (`seq_per_img`).
    """
    order = rng.permutation(count)[:wanted]
    return np.concatenate([order, rng.integers(count, size=max(wanted - count, 0))])


class SwitchedCaptions:
    """Makes pieces of captions that are switched anew each time; what a word becomes is made once.

    Args:
        switcher: replaces words.
        tokenizer: makes pieces of words.
    """

    def __init__(self, switcher: CodeSwitcher, tokenizer: XLMRTokenizer) -> None:
        self.switcher = switcher
        self.tokenizer = tokenizer
        self._pieces: dict[str, list[int]] = {}

    def pieces(self, text: str, rng: np.random.Generator) -> Tokens | None:
        """Pieces of a caption with some words replaced; None where it stayed as it is."""
        switched = self.switcher.switch(text, rng)
        if switched == text:
            return None
        words = switched.split(" ")
        unknown = [word for word in words if word not in self._pieces]
        if unknown:
            self._pieces.update(zip(unknown, self.tokenizer.pieces(unknown)))
        return np.array([piece for word in words for piece in self._pieces[word]], dtype=np.int64)


# -- regions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RegionArrays:
    """The regions of one picture.

    Args:
        features: not normalised, float32 [R, F].
        boxes: five numbers each, scaled to length 1, float32 [R, 5].
        classes: int64 [R], 0 is background.
        distribution: of the classes, float32 [R, C]; None where it is not asked for.
    """

    features: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    classes: Ints
    distribution: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Pictures:
    """Some pictures and where their regions are.

    Args:
        name, version: for the record.
        keys: of the pictures.
        features: files of regions.
        source: which of these holds each picture, [N].
        root: folder of the data set.
        missing: pictures without regions, left out.
    """

    name: str
    version: str
    keys: Sequence[str]
    features: Sequence[RegionFeatures]
    source: npt.NDArray[np.integer[Any]]
    root: Path
    missing: Sequence[str] = ()

    def listing(self) -> Listing:
        """The pictures as rows of a listing."""
        clips = ClipTable(self.root, self.keys, np.full(len(self.keys), -1))
        return Listing(self.name, self.version, clips, (), self.root, len(self.missing), tuple(self.missing[:20]))


class RegionItems(ItemDataset):
    """Pictures as regions: what an evaluation reads, `regions` and `index`.

    Args:
        pictures: the pictures.
        max_regions: regions of a picture that are used, the first ones. Of no picture there need be so many; see
            `pad_regions`.
        cache_bytes: memory for regions; they are kept when those of all pictures fit in.
        distributions: also read the distribution of classes.
        options: see ItemDataset.

    Raises:
        ValueError: there are no distributions.
    """

    def __init__(
        self,
        pictures: Pictures,
        max_regions: int = 100,
        cache_bytes: int = 0,
        distributions: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(pictures.listing(), **options)
        self.pictures = pictures
        self.max_regions = max_regions
        self.distributions = distributions
        width = pictures.features[0].feature_size
        self._kept: dict[int, RegionArrays] | None = None
        if len(pictures.keys) * self.max_regions * (width + 7) * 4 <= cache_bytes:
            self._kept = {}
        if distributions:
            # Features without them stop the run before it begins; damaged ones are met again later.
            with contextlib.suppress(MediaError):
                self.regions(0)

    def regions(self, file: int) -> RegionArrays:
        """The regions of a picture.

        Raises:
            MediaError: they are damaged.
        """
        if self._kept is not None and file in self._kept:
            return self._kept[file]
        key = self.pictures.keys[file]
        try:
            found = self.pictures.features[int(self.pictures.source[file])][key]
        except (RegionError, KeyError) as error:
            raise MediaError(f"{self.pictures.name}, picture {key}: {error}") from error
        count = self.max_regions
        if self.distributions and found.distribution is None:
            raise ValueError(
                f"{self.pictures.name}: its region features hold one class each and no `distribution`, which "
                "data.distributions asks for; extract them with it, or set that to false"
            )
        regions = RegionArrays(
            found.features[:count],
            found.box_vectors[:count],
            found.labels[:count],
            found.distribution[:count] if self.distributions and found.distribution is not None else None,
        )
        if self._kept is not None:
            self._kept[file] = regions
        return regions

    def _make(self, file: int, rng: np.random.Generator) -> Sample:
        return {"regions": self.regions(file)}

    def fill_cache(self) -> None:
        if self._kept is not None:
            for file in range(len(self.listing)):
                try:
                    self.regions(file)
                except MediaError:
                    continue  # met again, and counted, when it is asked for

    def preview(self, item: int) -> npt.NDArray[np.uint8]:
        raise ValueError("region features hold no picture")

    def describe(self) -> dict[str, Any]:
        missing = len(self.pictures.missing)
        return {**super().describe(), **({"without_regions": missing} if missing else {})}


# -- pairs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PairGroup:
    """Candidates of one image or of one caption, or a single true pair.

    Args:
        captions: pieces of one caption, or of N.
        languages: number of the language of each caption, in which it was before words of it were switched.
        images: regions of one image, or of N.
        positive: position of the true candidate.
        noise: random numbers for masking: `text` [N], `words` [N, tokens, 3], `regions` [N, regions, 2]; empty without.
    """

    captions: list[Tokens]
    languages: list[int]
    images: list[RegionArrays]
    positive: int
    noise: Mapping[str, npt.NDArray[np.float64]]

    def __len__(self) -> int:
        """Number of pairs."""
        return max(len(self.captions), len(self.images))


class PairItems(RegionItems):
    """Captions and images to be matched (specification 6.2 and 9).

    An item is an image with one of its captions. It becomes two groups of N pairs: `t2i`, the caption and N images, and
    `i2t`, the image and N captions, in each of which one is true; or, for candidates within the batch, the pair
    `in_batch`. An epoch shows an image `captions_per_image` times; which captions these are is drawn anew every epoch.
    Negatives are drawn uniformly from the other images, each at most once.

    Args:
        pictures: the images.
        pool: their captions, row by row.
        tokenizer: whose `max_tokens` cuts captions.
        languages: languages in the order of their numbers; a caption in another one has the number 0.
        captions_per_image: captions of each image and epoch; one with fewer shows some again.
        candidates: N.
        vlm_candidates: where negatives come from.
        exclude_siblings: no other caption of an image is a negative of it, nor is what belongs to another image of its
            group, as both would be true; the released pre-training code leaves out the caption itself alone.
        switched: replaces words of captions in its source language; None leaves them alone.
        masked: whether to draw random numbers for masking.
        options: see RegionItems and ItemDataset.

    Raises:
        ValueError: there are too few images to draw negatives from.
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
        own = self.regions(file)
        caption = self._chosen(file, slot, epoch)
        if self.vlm_candidates == "in_batch":
            return {
                "in_batch": PairGroup(*self._texts([caption], rng), [own], 0, self._noise(1, rng)),
                "group": torch.tensor(int(self.pool.groups[file])),
            }
        sides: Sample = {}
        for side in ("t2i", "i2t"):
            positive = int(rng.integers(self.candidates))
            others = self._negatives(file, caption, side == "t2i", rng)
            noise = self._noise(self.candidates, rng)
            if side == "t2i":
                images = [regions for _, _, regions in others if regions is not None]
                images.insert(positive, own)
                sides[side] = PairGroup(*self._texts([caption], rng), images, positive, noise)
            else:
                texts, languages = self._texts([*(number for _, number, _ in others), caption], rng)
                texts.insert(positive, texts.pop())
                languages.insert(positive, languages.pop())
                sides[side] = PairGroup(texts, languages, [own], positive, noise)
        return sides

    def _texts(self, captions: Sequence[int], rng: np.random.Generator) -> tuple[list[Tokens], list[int]]:
        """Pieces of some captions, each switched on its own, and the numbers of their languages."""
        languages = [self.numbers.get(self.pool.caption(number)[0].language, 0) for number in captions]
        return [self._pieces(number, rng) for number in captions], languages

    def _chosen(self, file: int, slot: int, epoch: int) -> int:
        """Number of the caption that an epoch shows of an image in one of its places."""
        captions = self.pool.of(file)
        if len(captions) == self.passes == 1:
            return int(captions[0])
        # The same for all places of an image in an epoch, so that together they are what was drawn.
        rng = np.random.default_rng((self.seed, epoch, file, self.passes))
        return int(captions[forced_captions(len(captions), self.passes, rng)[slot]])

    def read(self, key: tuple[int, int]) -> tuple[str, str, Tokens]:
        """The caption of an item: its language, as it stands in its file, and the pieces that training reads."""
        epoch, item = key
        sample = self[key]
        tokens, number = self.pool.caption(self._chosen(int(sample["index"]), item // len(self.listing), epoch))
        group: PairGroup = sample["in_batch" if self.vlm_candidates == "in_batch" else "t2i"]
        return tokens.language, tokens.texts[number], group.captions[0]

    def _pieces(self, number: int, rng: np.random.Generator) -> Tokens:
        tokens, own = self.pool.caption(number)
        pieces: Tokens | None = None
        if self.switched is not None and tokens.language == self.switched.switcher.source:
            pieces = self.switched.pieces(tokens.texts[own], rng)
        return (tokens.pieces(own) if pieces is None else pieces)[: self.max_pieces]

    def _negatives(
        self, file: int, caption: int, read: bool, rng: np.random.Generator
    ) -> list[tuple[int, int, RegionArrays | None]]:
        """Other images, each with the number of a caption, and with its regions where these are to be read.

        One that cannot be read is counted and replaced.
        """
        found: dict[int, tuple[int, RegionArrays | None]] = {}
        error: MediaError | None = None
        for _ in range(ATTEMPTS * self.candidates):
            other = int(rng.integers(len(self.pool)))
            theirs = self.pool.of(other)
            number = int(theirs[int(rng.random() * len(theirs))])
            sibling = self.exclude_siblings and self.pool.groups[other] == self.pool.groups[file]
            if other in found or number == caption or sibling:
                continue
            try:
                found[other] = (number, self.regions(other) if read else None)
            except MediaError as problem:
                error = problem
                self.skipped.record(other, problem)
            if len(found) == self.candidates - 1:
                return [(image, *drawn) for image, drawn in found.items()]
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
    """Makes batches of the samples of `PairItems`.

    Args:
        tokenizer: whose numbers are used.
        masking: what is masked; None masks nothing.
        max_regions: rows for regions that every batch has at least, see `pad_regions`.
    """

    def __init__(self, tokenizer: XLMRTokenizer, masking: Masking | None, max_regions: int = 0) -> None:
        self.tokenizer = tokenizer
        self.masking = masking
        self.max_regions = max_regions

    def __call__(self, samples: Sequence[Sample]) -> dict[str, dict[str, Tensor]]:
        """A batch for each kind of group in the samples; row g * N + n is pair n of group g.

        Returns:
            `tokens` int64 [P, L], padded at the end, `token_mask` bool [P, L], and `languages` int64 [P]; `regions`
            float32 [P, R, F], of length 1 or 0, `boxes` float32 [P, R, 5] and `region_mask` bool [P, R]; `positive`
            int64 [G], or for pairs in the batch `group` int64 [P]. With masking, `word_labels` int64 [P, L] and
            `region_labels` int64 [P, R], -1 where nothing is to be guessed and everywhere but in the true pairs;
            `region_targets` float32 [K, F], the features of the K labelled regions as the detector gave them, row by
            row, and, where there are any, `region_distributions` [K, C].
        """
        return {
            name: self._group([sample[name] for sample in samples])
            | (
                {"group": torch.stack([sample["group"] for sample in samples])}
                if name == "in_batch"
                else {"positive": torch.tensor([sample[name].positive for sample in samples])}
            )
            for name in ("t2i", "i2t", "in_batch")
            if name in samples[0]
        }

    def _group(self, groups: Sequence[PairGroup]) -> dict[str, Tensor]:
        pairs = len(groups[0])
        captions = [caption for group in groups for caption in group.captions]
        images = [image for group in groups for image in group.images]
        tokens, lengths = pad_captions(captions, self.tokenizer)
        languages = np.array([number for group in groups for number in group.languages], dtype=np.int64)
        regions = pad_regions(images, self.max_regions)
        if len(captions) < len(groups) * pairs:
            tokens, lengths = np.repeat(tokens, pairs, axis=0), np.repeat(lengths, pairs)
            languages = np.repeat(languages, pairs)
        if len(images) < len(groups) * pairs:
            regions = {name: np.repeat(column, pairs, axis=0) for name, column in regions.items()}
        places = np.arange(tokens.shape[1])
        features = regions["features"]
        labels: dict[str, npt.NDArray[Any]] = {}
        if self.masking is not None:
            noise = {name: np.concatenate([group.noise[name] for group in groups]) for name in groups[0].noise}
            true = np.zeros((len(groups), pairs), dtype=np.bool_)
            true[np.arange(len(groups)), [group.positive for group in groups]] = True
            read_text = noise["text"] < self.masking.text_share
            masked, word_labels = mask_words(
                tokens,
                (places > 0) & (places <= lengths[:, None]),
                noise["words"][:, : tokens.shape[1]],
                self.tokenizer.mask_id,
                self.tokenizer.vocabulary_size,
                self.masking,
            )
            tokens = np.where(read_text[:, None], masked, tokens)
            zeroed, region_labels = mask_regions(
                regions["classes"], regions["mask"], noise["regions"][:, : features.shape[1]], self.masking
            )
            region_labels[read_text | ~true.reshape(-1)] = NO_LABEL
            labels = {
                "word_labels": np.where((read_text & true.reshape(-1))[:, None], word_labels, NO_LABEL),
                "region_labels": region_labels,
                "region_targets": features[region_labels != NO_LABEL],
            }
            if "distribution" in regions:
                labels["region_distributions"] = regions["distribution"][region_labels != NO_LABEL]
            features = np.where((zeroed & ~read_text[:, None])[:, :, None], np.float32(0), features)
        columns = {
            "tokens": tokens,
            "token_mask": places < lengths[:, None] + 2,
            "languages": languages,
            "regions": unit_length(features),
            "boxes": regions["boxes"],
            "region_mask": regions["mask"],
            **labels,
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}


def pad_captions(
    captions: Sequence[Tokens], tokenizer: XLMRTokenizer, width: int = 0
) -> tuple[npt.NDArray[np.int64], Ints]:
    """Put boundary tokens around pieces and fill the shorter captions up.

    Args:
        captions: pieces of each.
        tokenizer: whose numbers are used.
        width: at least so many tokens.

    Returns:
        Tokens int64 [P, L] and numbers of pieces int64 [P]. Caption p occupies its first `lengths[p]` + 2 places.
    """
    lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
    tokens = np.full((len(captions), max(int(lengths.max(initial=0)) + 2, width)), tokenizer.pad_id, dtype=np.int64)
    places = np.arange(tokens.shape[1])
    tokens[:, 0] = tokenizer.start_id
    tokens[(places > 0) & (places <= lengths[:, None])] = np.concatenate(captions)
    tokens[np.arange(len(captions)), lengths + 1] = tokenizer.end_id
    return tokens, lengths


def pad_regions(images: Sequence[RegionArrays], width: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Regions of several pictures in one array, filled up with zeros.

    Text stands behind the last row for a region. Its position, and so what the encoder makes of it, must not depend on
    which pictures share a batch, a process or a data set.

    Args:
        images: the pictures.
        width: at least so many rows R.

    Returns:
        `features` float32 [P, R, F], `boxes` float32 [P, R, 5], `classes` int64 [P, R], `mask` bool [P, R], and
        `distribution` float32 [P, R, C] where the pictures have it.
    """
    counts = np.array([len(image.features) for image in images])
    mask = np.arange(max(int(counts.max()), width)) < counts[:, None]

    def together(rows: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        if mask.all():
            return np.stack(rows)
        whole = np.zeros((*mask.shape, *rows[0].shape[1:]), dtype=rows[0].dtype)
        whole[mask] = np.concatenate(rows)
        return whole

    columns: dict[str, npt.NDArray[Any]] = {
        name: together([getattr(image, name) for image in images]) for name in ("features", "boxes", "classes")
    }
    distributions = [image.distribution for image in images if image.distribution is not None]
    if distributions:
        columns["distribution"] = together(list(distributions))
    return {**columns, "mask": mask}


def unit_length(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Vectors scaled to length 1; a vector of zeros stays one."""
    lengths = np.sqrt(np.einsum("...f,...f->...", features, features))[..., None]
    return features / np.maximum(lengths, np.float32(1e-12))


# -- evaluation --------------------------------------------------------------------------------------------------------


def collate_regions(samples: Sequence[Sample], max_regions: int) -> dict[str, Tensor]:
    """A batch of pictures: `regions` [B, R, F], `boxes` [B, R, 5], `region_mask` [B, R], `index` and `skipped` [B]."""
    regions = pad_regions([sample["regions"] for sample in samples], max_regions)
    return {
        "regions": torch.from_numpy(unit_length(regions["features"])),
        "boxes": torch.from_numpy(regions["boxes"]),
        "region_mask": torch.from_numpy(regions["mask"]),
        **{name: torch.stack([sample[name] for sample in samples]) for name in ("index", "skipped")},
    }


class CaptionItems(Dataset[Sample]):
    """Captions to be found, each with the image that it describes.

    Args:
        tokens: pieces of all captions of the set.
        numbers: captions that are used, [C].
        images: position of the image of each, [C].
        tokenizer: whose `max_tokens` cuts them.
    """

    def __init__(self, tokens: CaptionTokens, numbers: Ints, images: Ints, tokenizer: XLMRTokenizer) -> None:
        self.tokens = tokens
        self.numbers = numbers
        self.images = images
        self.tokenizer = tokenizer
        self.width = min(tokens.longest() + 2, tokenizer.max_tokens)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> Sample:
        return {
            "pieces": self.tokens.pieces(int(self.numbers[item]))[: self.tokenizer.max_tokens - 2],
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


def read_picture(path: Path) -> npt.NDArray[np.uint8] | None:
    """A picture to look at, uint8 [H, W, 3]; None where it is not there or cannot be read."""
    try:
        return np.asarray(read_image(path))
    except ImageError:
        return None
