"""ROUGE-L of captions (Lin, 2004) as coco-caption computes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.metrics.captioning.caption_set import CaptionSet, Floats, mean

_BETA_SQUARED = 1.2**2  # recall counts more than precision


def rouge_l(captions: CaptionSet) -> tuple[float, Floats]:
    """F-measure of the longest common subsequence with the references.

    The best precision and the best recall may come from different references. Sentences are split at single spaces, so
    an empty one has one empty word, and empty against empty is a perfect match.

    Returns:
        Mean over items (NaN without any) and scores per item [N].

    Examples:
        >>> score, items = rouge_l(CaptionSet(["a man rides a horse"], [["a man on a horse"]]))
        >>> round(score, 3)
        0.8

    Source: docs/papers/vx2text.md [11] (beta 1.2, maxima taken separately).
    """
    precision, recall = np.zeros(len(captions)), np.zeros(len(captions))
    for item, (candidate, references) in enumerate(zip(captions.candidates, captions.references)):
        words = candidate.split(" ")
        places = _places(words)
        for reference in references:
            other = reference.split(" ")
            common = len(words) if words == other else _common(places, len(words), other)
            precision[item] = max(precision[item], common / len(words))
            recall[item] = max(recall[item], common / len(other))
    denominator = recall + _BETA_SQUARED * precision
    score = np.zeros(len(captions))
    np.divide((1 + _BETA_SQUARED) * precision * recall, denominator, out=score, where=denominator > 0)
    return mean(score), score


def _places(words: Sequence[str]) -> dict[str, int]:
    """A bit mask of positions for every word."""
    places: dict[str, int] = {}
    for position, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << position
    return places


def _common(places: dict[str, int], length: int, second: Sequence[str]) -> int:
    everything = (1 << length) - 1
    free = everything  # a cleared bit is a position where the common subsequence grows by one
    for word in second:
        if here := places.get(word):
            matched = free & here
            free = (free + matched | free - matched) & everything
    return length - free.bit_count()
