"""The two ways to choose candidates for matching images and captions: `Groups` (the paper's) and `InBatch`.

Both classes draw a sample's candidates, say which rows of a batch form pairs, and compute the matching losses. `pairs`
is a `papers.m3p.pairs.PairItems`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.media import MediaError
from common.data.regions import Regions
from common.losses.matching import candidate_matching, in_batch_matching
from papers.m3p.encoder import all_pairs

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

    captions: list[npt.NDArray[np.integer[Any]]]
    images: list[Regions]
    positive: int
    noise: Mapping[str, npt.NDArray[np.float64]]
    image_group: int = 0

    def __len__(self) -> int:
        return max(len(self.captions), len(self.images))


@dataclass(frozen=True)
class Groups:
    """Draws N images for every caption (`t2i`) and N captions for every image (`i2t`) from the whole set.

    Other captions of the image, and captions of images that show the same thing, also match, so they are never
    negatives. The released pre-training code only excludes the caption itself. Row g * N + n of a batch is pair n of
    group g. `positive` [G] is the position of each group's true pair.

    Source: [6.2] and [9].
    """

    count: int = 4

    def check(self, pairs: Any, world_size: int) -> None:
        most = len(pairs.pool) + 1 - int(np.bincount(pairs.pool.groups).max())
        if not 2 <= self.count <= most:
            listing = pairs.listing
            raise ValueError(
                f"data.candidates is {self.count}, but must be from 2 to {most}: {listing.name}, {listing.version}, "
                f"has {len(pairs.pool)} images; or set data.vlm_candidates to in_batch"
            )

    def draw(self, pairs: Any, image: int, caption: int, rng: np.random.Generator) -> dict[str, PairGroup]:
        regions = pairs.regions(image)
        # Draw the random numbers in this order: images for the caption, then captions for the image.
        positive = int(rng.integers(self.count))
        images = list(islice(_readable(pairs, self.negatives(pairs, image, rng)), self.count - 1))
        images.insert(positive, regions)
        noise = pairs.noise(self.count, rng)
        t2i = PairGroup([pairs.pieces(caption, rng)], images, positive, noise)
        positive = int(rng.integers(self.count))
        others = [other for _, other in islice(self.negatives(pairs, image, rng), self.count - 1)]
        noise = pairs.noise(self.count, rng)
        captions = [pairs.pieces(number, rng) for number in [*others, caption]]
        captions.insert(positive, captions.pop())
        return {"t2i": t2i, "i2t": PairGroup(captions, [regions], positive, noise)}

    def negatives(self, pairs: Any, image: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
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

    # -- a batch -------------------------------------------------------------------------------------------------------

    @staticmethod
    def targets(groups: Sequence[PairGroup]) -> dict[str, Tensor]:
        return {"positive": torch.tensor([group.positive for group in groups])}

    @staticmethod
    def joined(images: Tensor, texts: Tensor) -> Tensor:
        """Concatenate rows [P, R, ...] and [P, L, ...] to pairs [P, R + L, ...]."""
        return torch.cat([images, texts], dim=1)

    @staticmethod
    def true_and_false(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the rows [G] of the true pairs, and the rows [G] of one false pair per group."""
        positive = batch["positive"]
        count = len(batch["tokens"]) // len(positive)
        first = torch.arange(len(positive), device=positive.device) * count
        return first + positive, first + (positive + 1) % count

    @staticmethod
    def match(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the match's softmax loss and binary loss from the logits [G, N] of all candidates."""
        return candidate_matching(logits, batch["positive"])


def _readable(pairs: Any, negatives: Iterable[tuple[int, int]]) -> Iterator[Regions]:
    """Yield the regions of negative images. Skip and count unreadable images."""
    for image, _ in negatives:
        try:
            yield pairs.regions(image)
        except MediaError as error:
            pairs.skipped.record(image, error)


@dataclass(frozen=True)
class InBatch:
    """Compares all images and captions of a batch of B true pairs. Only the miniature uses this class ([13.2]).

    Pair i * B + j has image i and caption j. Pairs with the same number in `group` [B] aren't negatives of each other.
    """

    def check(self, pairs: Any, world_size: int) -> None:
        if world_size > 1:
            raise ValueError(
                "trainer.devices: data.vlm_candidates in_batch compares all pairs of a batch on one device; "
                "use one device, or set data.vlm_candidates to groups"
            )

    def draw(self, pairs: Any, image: int, caption: int, rng: np.random.Generator) -> dict[str, PairGroup]:
        regions = pairs.regions(image)
        pieces, noise = [pairs.pieces(caption, rng)], pairs.noise(1, rng)
        return {"in_batch": PairGroup(pieces, [regions], 0, noise, int(pairs.pool.groups[image]))}

    # -- a batch -------------------------------------------------------------------------------------------------------

    @staticmethod
    def targets(groups: Sequence[PairGroup]) -> dict[str, Tensor]:
        return {"group": torch.tensor([group.image_group for group in groups])}

    @staticmethod
    def joined(images: Tensor, texts: Tensor) -> Tensor:
        """Combine rows [B, R, ...] with rows [B, L, ...] to all pairs [B * B, R + L, ...]."""
        return all_pairs(images, texts)

    @staticmethod
    def true_and_false(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the rows [B] of the true pairs, and of false pairs: each image with the next caption of another group.

        If all captions have the same group, use the next caption.
        """
        group = batch["group"]
        size = len(group)
        number = torch.arange(size, device=group.device)
        distance = (number[None, :] - number[:, None]) % size
        distance = distance.masked_fill(group[:, None] == group[None, :], size)
        other = torch.where((distance < size).any(1), distance.argmin(1), (number + 1) % size)
        return number * (size + 1), number * size + other

    @staticmethod
    def match(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the match's softmax loss and binary loss from the logits [B, B], in both directions."""
        return in_batch_matching(logits, batch["group"])


Candidates = Groups | InBatch
#: How each kind of batch chooses candidates.
KINDS: dict[str, type[Candidates]] = {"t2i": Groups, "i2t": Groups, "in_batch": InBatch}


def candidates_of(batch: Mapping[str, Any]) -> type[Candidates]:
    return InBatch if "group" in batch else Groups
