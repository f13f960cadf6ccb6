"""BLEU, ROUGE-L and CIDEr-D of captions, as coco-caption computes them.

Source: Papineni et al. (2002), Lin (2004), Vedantam et al. (2015).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from common.metrics.captioning.caption_set import ORDERS, CaptionSet, Floats, Ints, mean

# Smooth orders without a match or n-gram, so that only the brevity penalty gives exactly zero.
_TINY, _SMALL = 1e-15, 1e-9


def bleu(captions: CaptionSet) -> tuple[Floats, Floats]:
    """Compute BLEU-1 to BLEU-4.

    The matches of an n-gram are limited to the largest count in a reference. The brevity penalty uses the closest
    reference length, or the shorter of two equally close lengths. Corpus scores come from the summed counts of all
    items; they are not means.

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
        # Number the candidates' n-grams to find each one's largest count in the item's references.
        entry = candidate.copy()
        entry.data = np.arange(1, entry.nnz + 1)
        shared = entry[captions.owner] * (reference > 0)
        most = np.zeros(entry.nnz)
        np.maximum.at(most, shared.data - 1, (reference * (shared > 0)).data)
        entry.data = np.minimum(candidate.data, most)
        matches[:, order - 1] = entry.sum(1)
        totals[:, order - 1] = np.maximum(length - order + 1, 0)
    # One minimum finds the closest length, then the shortest, because a single number combines distance and length.
    span = int(reference_length.max(initial=0)) + 1
    closeness = np.abs(reference_length - length[captions.owner]) * span + reference_length
    nearest = np.full(items, np.iinfo(np.int64).max)
    np.minimum.at(nearest, captions.owner, closeness)
    closest = nearest % span
    corpus = _score(matches.sum(0), totals.sum(0), length.sum(), closest.sum())
    per_item = _score(matches, totals, length[:, None], closest[:, None])
    return corpus if items else np.full(ORDERS, np.nan), per_item


def _score(matches: Floats, totals: Floats, length: Ints, closest: Ints) -> Floats:
    """Multiply the geometric mean of the precisions up to each order [..., K] by the brevity penalty."""
    precision = (matches + _TINY) / (totals + _SMALL)
    score = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, precision.shape[-1] + 1))
    ratio = (length + _TINY) / (closest + _SMALL)
    return score * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1)


_BETA_SQUARED = 1.2**2  # weights recall more than precision


def rouge_l(captions: CaptionSet) -> tuple[float, Floats]:
    """Compute the F-measure of the longest common subsequence with the references.

    The best precision and the best recall may come from different references. Sentences are split at single spaces. So
    an empty sentence consists of one empty word, and two empty sentences match.

    Returns:
        Mean over items (NaN without items) and scores per item [N].

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
    """Return the positions of each word as a bit mask."""
    places: dict[str, int] = {}
    for position, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << position
    return places


def _common(places: dict[str, int], length: int, second: Sequence[str]) -> int:
    everything = (1 << length) - 1
    free = everything  # at a cleared bit, the common subsequence grows by one
    for word in second:
        if here := places.get(word):
            matched = free & here
            free = (free + matched | free - matched) & everything
    return length - free.bit_count()


#: Width of the Gaussian penalty on the difference in length, counted in bigrams.
_SIGMA = 6.0


def cider(captions: CaptionSet) -> tuple[float, Floats]:
    """Compute the cosine between the n-gram vectors of candidate and references. Rare n-grams have more weight.

    This is CIDEr-D, which coco-caption and the papers call CIDEr. The weights come from the references of all items, so
    a score depends on all items. A single item gets 0.

    Returns:
        Mean over items (NaN without items) and scores per item [N], between 0 and 10.

    Examples:
        >>> captions = CaptionSet(["a red bus", "two cats"], [["a red bus"], ["two dogs"]])
        >>> score, items = cider(captions)
        >>> items.round(2)
        array([7.5 , 1.25])

    Source: docs/papers/vx2text.md [11] (clipped counts, bigram lengths, sigma 6, log N - log df, times 10).
    """
    items, references = len(captions), len(captions.owner)
    similarity = np.zeros(references)
    members = csr_array((np.ones(references), (captions.owner, np.arange(references))), (items, references))
    for candidate, reference in captions.ngrams:
        document_frequency = np.bincount((members @ reference).indices, minlength=reference.shape[1])
        rarity = np.log(max(items, 1)) - np.log(np.maximum(document_frequency, 1))
        ours, theirs = candidate.multiply(rarity).tocsr(), reference.multiply(rarity).tocsr()
        ones = np.ones(len(rarity))  # a product adds in order; `sum` rounds differently
        candidate_square, reference_square = ours**2 @ ones, theirs**2 @ ones
        cosine = (ours[captions.owner].minimum(theirs) * theirs) @ ones
        norm = np.sqrt(candidate_square)[captions.owner] * np.sqrt(reference_square)
        similarity += np.divide(cosine, norm, out=np.zeros(references), where=norm > 0)
    bigrams, reference_bigrams = (np.maximum(length - 1, 0) for length in captions.lengths)
    difference = bigrams[captions.owner] - reference_bigrams
    similarity *= np.exp(-(difference**2) / (2 * _SIGMA**2))
    score = 10 / ORDERS * np.bincount(captions.owner, similarity) / np.bincount(captions.owner)
    return mean(score), score
