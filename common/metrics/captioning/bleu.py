"""BLEU of captions (Papineni et al., 2002) as coco-caption computes it."""

from __future__ import annotations

import numpy as np

from common.metrics.captioning.caption_set import ORDERS, CaptionSet, Floats, Ints

# Value of an order without a match or n-gram, so only the brevity penalty gives an exact zero.
_TINY, _SMALL = 1e-15, 1e-9


def bleu(captions: CaptionSet) -> tuple[Floats, Floats]:
    """BLEU-1 to BLEU-4.

    Matches are clipped by the largest count in one reference. The reference length is the closest one, the shorter on a
    tie. Corpus scores add up the counts of all items; they are not means.

    Returns:
        Corpus scores [4] (NaN without items) and scores per item [N, 4].

    Examples:
        >>> corpus, items = bleu(CaptionSet(["a man rides a horse"], [["a man rides a horse", "a man on a horse"]]))
        >>> corpus.round(3)
        array([1., 1., 1., 1.])

    Source: docs/papers/vx2text.md [11] (closest length, smoothing 1e-15 and 1e-9).
    """
    items = len(captions)
    length, reference_length = captions.lengths
    matches, totals = np.zeros((items, ORDERS)), np.zeros((items, ORDERS))
    for order, (candidate, reference) in enumerate(captions.ngrams, start=1):
        # Number the candidates' n-grams to find the largest count of each in the item's references.
        entry = candidate.copy()
        entry.data = np.arange(1, entry.nnz + 1)
        shared = entry[captions.owner] * (reference > 0)
        most = np.zeros(entry.nnz)
        np.maximum.at(most, shared.data - 1, (reference * (shared > 0)).data)
        entry.data = np.minimum(candidate.data, most)
        matches[:, order - 1] = entry.sum(1)
        totals[:, order - 1] = np.maximum(length - order + 1, 0)
    # The closest length first, then the shorter: one minimum over distance and length as a single number.
    span = int(reference_length.max(initial=0)) + 1
    closeness = np.abs(reference_length - length[captions.owner]) * span + reference_length
    nearest = np.full(items, np.iinfo(np.int64).max)
    np.minimum.at(nearest, captions.owner, closeness)
    closest = nearest % span
    corpus = _score(matches.sum(0), totals.sum(0), length.sum(), closest.sum())
    per_item = _score(matches, totals, length[:, None], closest[:, None])
    return corpus if items else np.full(ORDERS, np.nan), per_item


def _score(matches: Floats, totals: Floats, length: Ints, closest: Ints) -> Floats:
    """Geometric mean of the precisions up to every order [..., K], times the brevity penalty."""
    precision = (matches + _TINY) / (totals + _SMALL)
    score = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, precision.shape[-1] + 1))
    ratio = (length + _TINY) / (closest + _SMALL)
    return score * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1)
