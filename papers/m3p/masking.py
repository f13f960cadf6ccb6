"""What the model has to guess: masked words and masked regions ([6.1] and [6.2]).

All functions take their random numbers as arguments, so that a batch is masked at once and each of its rows still
depends on its own random numbers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

#: Label of a place where nothing is to be guessed.
NO_LABEL = -1
#: Uniform random numbers that a word needs, and a region.
WORD_NOISE, REGION_NOISE = 3, 2


@dataclass(frozen=True)
class Masking:
    """Shares of what is masked.

    Args:
        words: of the pieces of a caption or of a text that are chosen.
        mask, random: of the chosen ones that become `<mask>` and that become any piece; the rest stays.
        regions: of the regions that are chosen.
        kept_regions: of the chosen ones that stay; the others become zero.
        text_fraction: of the pairs whose words are masked; those of the others whose regions are. Never both.

    Source: [6.1] and [6.2].
    """

    words: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    regions: float = 0.15
    kept_regions: float = 0.1
    text_fraction: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"masking.{name} is a share, got {value}")
        if self.mask + self.random > 1.0:
            raise ValueError(f"masking: mask and random are shares of one whole, got {self.mask} and {self.random}")


DEFAULT_MASKING = Masking()


def mask_words(
    tokens: Ints,
    maskable: Bools,
    noise: Floats,
    mask_id: int,
    vocabulary_size: int,
    masking: Masking = DEFAULT_MASKING,
) -> tuple[Ints, Ints]:
    """Mask pieces of captions; where chance chose none of a caption, its first one is.

    Args:
        tokens: token ids.
        maskable: which of them are pieces, and not boundary tokens or padding; a row may have none.
        noise: in [0, 1).
        mask_id: number of `<mask>`.
        vocabulary_size: number of different tokens, all of which may stand in for a piece.
        masking: the shares.

    Shapes:
        tokens [P, L]; maskable [P, L]; noise [P, L, 3]

    Returns:
        Tokens, and labels that hold the true piece at the chosen places and -1 elsewhere; both [P, L].

    Source: [6.2].
    """
    chosen = (noise[:, :, 0] < masking.words) & maskable
    lacking = np.flatnonzero(~chosen.any(axis=1) & maskable.any(axis=1))
    chosen[lacking, maskable[lacking].argmax(axis=1)] = True
    return _disguise(tokens, chosen, noise[:, :, 1], noise[:, :, 2], mask_id, vocabulary_size, masking)


def mask_stream(
    tokens: Ints,
    noise: Floats,
    mask_id: int,
    pad_id: int,
    vocabulary_size: int,
    masking: Masking = DEFAULT_MASKING,
    multiple_of: int = 1,
) -> tuple[Ints, Ints]:
    """Mask tokens of blocks of running text; never a row's first one, nor padding.

    Args:
        tokens: token ids; closing tokens inside may be masked like words.
        noise: in [0, 1).
        mask_id, pad_id: numbers of `<mask>` and of padding.
        vocabulary_size: number of different tokens.
        masking: the shares.
        multiple_of: of the chosen tokens the first ones are let go until their number is a multiple of this; 8 is what
            the released code does in half precision. Fewer than this many all stay.

    Shapes:
        tokens [B, L]; noise [B, L, 3]

    Returns:
        Tokens, and labels as those of `mask_words`. Where chance chose none, the very first token is.

    Source: [6.1].
    """
    chosen = (noise[:, :, 0] < masking.words) & (tokens != pad_id)
    chosen[:, 0] = False
    count = int(chosen.sum())
    if multiple_of > 1 and count > multiple_of:
        # The released code counts along time, so the first ones are the earliest of all rows.
        row, column = np.nonzero(chosen.T)[::-1]
        surplus = count % multiple_of
        chosen[row[:surplus], column[:surplus]] = False
    elif not count:
        chosen[0, 0] = True
    return _disguise(tokens, chosen, noise[:, :, 1], noise[:, :, 2], mask_id, vocabulary_size, masking)


def _disguise(
    tokens: Ints,
    chosen: Bools,
    kind: Floats,
    word: Floats,
    mask_id: int,
    vocabulary_size: int,
    masking: Masking,
) -> tuple[Ints, Ints]:
    masked = np.where(chosen & (kind < masking.mask), mask_id, tokens)
    at_random = chosen & (kind >= masking.mask) & (kind < masking.mask + masking.random)
    masked = np.where(at_random, (word * vocabulary_size).astype(np.int64), masked)
    return masked, np.where(chosen, tokens, NO_LABEL)


def mask_regions(classes: Ints, valid: Bools, noise: Floats, masking: Masking = DEFAULT_MASKING) -> tuple[Bools, Ints]:
    """Choose regions to be guessed; background is never one of them.

    Where chance chose none, one region is chosen and made zero. (The released code then asks for the last one, which it
    does not mask and which may be background.)

    Args:
        classes: the detector's classes, 0 is background.
        valid: which rows are regions, and not padding.
        noise: in [0, 1).
        masking: the shares.

    Shapes:
        classes [P, R]; valid [P, R]; noise [P, R, 2]

    Returns:
        Which regions are to be made zero, and labels that hold the class of the chosen ones and -1 elsewhere; both
        [P, R]. A picture of background alone has none.

    Source: [6.2].
    """
    eligible = valid & (classes != 0)
    chosen = eligible & (noise[:, :, 0] < masking.regions)
    zeroed = chosen & (noise[:, :, 1] >= masking.kept_regions)
    lacking = np.flatnonzero(~chosen.any(axis=1) & eligible.any(axis=1))
    # The smallest of equally distributed numbers stands at any place with the same probability.
    column = np.where(eligible[lacking], noise[lacking, :, 0], np.inf).argmin(axis=1)
    chosen[lacking, column] = True
    zeroed[lacking, column] = True
    return zeroed, np.where(chosen, classes, NO_LABEL)
