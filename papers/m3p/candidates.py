"""The two ways to choose what captions and images are compared with: `Groups` (the paper's) and `InBatch`.

Each draws the candidates of a sample, and knows which rows of a batch form pairs and how their match is trained.
`pairs` is a `papers.m3p.pairs.PairItems`.
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

#: Draws per candidate before an item fails, because some are the true pair, repeated or unreadable.
ATTEMPTS = 100


@dataclass(frozen=True, eq=False)
class PairGroup:
    """Candidates of one image or caption, or a single true pair.

    Args:
        captions, images: pieces and regions; one, or N.
        positive: the number of the true pair.
        noise: random numbers for masking: `text` [N], `words` [N, tokens, 3], `regions` [N, regions, 2]; may be empty.
        image_group: images of the same group show the same thing.
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
    """N images for every caption (`t2i`) and N captions for every image (`i2t`), drawn from the whole set.

    Other captions of an image, and other images of its group, match too, so they are never negatives. The released
    pre-training code only excludes the caption itself. Row g * N + n of a batch is pair n of group g; `positive` [G] is
    the true one.

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
        # Order of the random numbers: images for the caption, then captions for the image.
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
        """Other images, each once and with one of its captions."""
        pool, drawn = pairs.pool, set[int]()
        for _ in range(ATTEMPTS * self.count):
            other = int(rng.integers(len(pool)))
            captions = pool.of(other)
            number = int(captions[int(rng.random() * len(captions))])
            if other not in drawn and pool.groups[other] != pool.groups[image]:
                drawn.add(other)
                yield other, number
        raise MediaError(f"{pairs.listing.name}: too few images that can be used to draw negatives from")

    # -- a batch -------------------------------------------------------------------------------------------------------

    @staticmethod
    def targets(groups: Sequence[PairGroup]) -> dict[str, Tensor]:
        return {"positive": torch.tensor([group.positive for group in groups])}

    @staticmethod
    def joined(images: Tensor, texts: Tensor) -> Tensor:
        """Pairs [P, R + L, ...] of rows [P, R, ...] and [P, L, ...]."""
        return torch.cat([images, texts], dim=1)

    @staticmethod
    def true_and_false(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows [G] of the true pairs, and of one false pair per group."""
        positive = batch["positive"]
        count = len(batch["tokens"]) // len(positive)
        first = torch.arange(len(positive), device=positive.device) * count
        return first + positive, first + (positive + 1) % count

    @staticmethod
    def match(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Softmax and binary loss of the logits [G, N] of all candidates."""
        return candidate_matching(logits, batch["positive"])


def _readable(pairs: Any, negatives: Iterable[tuple[int, int]]) -> Iterator[Regions]:
    """Regions of the images of negatives; unreadable ones are counted and left out."""
    for image, _ in negatives:
        try:
            yield pairs.regions(image)
        except MediaError as error:
            pairs.skipped.record(image, error)


@dataclass(frozen=True)
class InBatch:
    """Compares all images and captions of a batch of B true pairs; the miniature's, not the paper's ([13.2]).

    Pair i * B + j has image i and caption j. Pairs with the same number in `group` [B] aren't negatives of each other.
    """

    def check(self, pairs: Any, world_size: int) -> None:
        if world_size > 1:
            raise ValueError(
                "trainer.devices: data.vlm_candidates in_batch compares all pairs of a batch, which must be on one "
                "device; use one device, or groups"
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
        """Pairs [B * B, R + L, ...] of rows [B, R, ...] and [B, L, ...]."""
        return all_pairs(images, texts)

    @staticmethod
    def true_and_false(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows [B] of the true pairs, and of each image with the next caption of another group, or the next one."""
        group = batch["group"]
        size = len(group)
        number = torch.arange(size, device=group.device)
        distance = (number[None, :] - number[:, None]) % size
        distance = distance.masked_fill(group[:, None] == group[None, :], size)
        other = torch.where((distance < size).any(1), distance.argmin(1), (number + 1) % size)
        return number * (size + 1), number * size + other

    @staticmethod
    def match(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Softmax and binary loss in both directions of the logits [B, B]."""
        return in_batch_matching(logits, batch["group"])


Candidates = Groups | InBatch
#: How each kind of batch chooses candidates.
KINDS: dict[str, type[Candidates]] = {"t2i": Groups, "i2t": Groups, "in_batch": InBatch}


def candidates_of(batch: Mapping[str, Any]) -> type[Candidates]:
    return InBatch if "group" in batch else Groups
