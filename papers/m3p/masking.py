"""Masks the words and regions that the model predicts ([6.1] and [6.2]).

All functions take uniform random numbers in [0, 1) as arguments. So they mask a whole batch at once, yet each row
depends only on its own numbers. Labels are the true word or class at chosen places and -1 elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.types import Fraction

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

#: Label of a place that isn't predicted.
NO_LABEL = -1
#: How many random numbers each word and each region takes.
WORD_NOISE, REGION_NOISE = 3, 2


@dataclass(frozen=True)
class Masking:
    """Shares of words and regions that are chosen for masking, and how they are masked.

    Args:
        mask, random: shares of chosen pieces that become `<mask>` or a random piece. Other chosen pieces don't change.
        kept_regions: share of chosen regions that don't change. Other chosen regions become zero.
        text_fraction: share of pairs with masked words. Other pairs have masked regions.

    Source: [6.1] and [6.2].
    """

    words: Fraction = 0.15
    mask: Fraction = 0.8
    random: Fraction = 0.1
    regions: Fraction = 0.15
    kept_regions: Fraction = 0.1
    text_fraction: Fraction = 0.5


DEFAULT_MASKING = Masking()


def mask_words(
    tokens: Ints,
    maskable: Bools,
    noise: Floats,
    mask_id: int,
    vocabulary_size: int,
    masking: Masking = DEFAULT_MASKING,
    each_row: bool = True,
) -> tuple[Ints, Ints]:
    """Mask some `maskable` pieces: at least one in each row or, if `each_row` is false, at least one in total.

    If `each_row` is false and none is chosen, mask the first piece of the first row, as in the released code.

    Shapes:
        tokens, maskable [P, L]; noise [P, L, 3] -> tokens, labels [P, L]

    Source: [6.1] and [6.2].
    """
    chosen = (noise[:, :, 0] < masking.words) & maskable
    if each_row:
        lacking = np.flatnonzero(~chosen.any(axis=1) & maskable.any(axis=1))
        chosen[lacking, maskable[lacking].argmax(axis=1)] = True
    elif not chosen.any():
        chosen[0, 0] = True
    kind, word = noise[:, :, 1], noise[:, :, 2]
    masked = np.where(chosen & (kind < masking.mask), mask_id, tokens)
    at_random = chosen & (kind >= masking.mask) & (kind < masking.mask + masking.random)
    masked = np.where(at_random, (word * vocabulary_size).astype(np.int64), masked)
    return masked, np.where(chosen, tokens, NO_LABEL)


def mask_regions(classes: Ints, valid: Bools, noise: Floats, masking: Masking = DEFAULT_MASKING) -> tuple[Bools, Ints]:
    """Choose regions to predict, never background (class 0). Return which regions to zero, and the labels.

    If the random numbers choose none, choose and zero one random region. In this case, the released code predicts the
    last region, without masking it and even if it is background.

    Shapes:
        classes, valid [P, R]; noise [P, R, 2] -> zeroed, labels [P, R]

    Source: [6.2].
    """
    eligible = valid & (classes != 0)
    chosen = eligible & (noise[:, :, 0] < masking.regions)
    zeroed = chosen & (noise[:, :, 1] >= masking.kept_regions)
    lacking = np.flatnonzero(~chosen.any(axis=1) & eligible.any(axis=1))
    # The position of the smallest random number is uniform.
    column = np.where(eligible[lacking], noise[lacking, :, 0], np.inf).argmin(axis=1)
    chosen[lacking, column] = True
    zeroed[lacking, column] = True
    return zeroed, np.where(chosen, classes, NO_LABEL)
