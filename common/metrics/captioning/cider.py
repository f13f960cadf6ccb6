"""CIDEr-D of captions (Vedantam et al., 2015) as coco-caption computes it."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from common.metrics.captioning.caption_set import ORDERS, CaptionSet, Floats, mean

#: Width of the Gaussian penalty on the difference in the number of bigrams.
_SIGMA = 6.0


def cider(captions: CaptionSet) -> tuple[float, Floats]:
    """Cosine of the n-gram vectors of candidate and references, weighted by how rare an n-gram is.

    This is CIDEr-D, which coco-caption and the papers call CIDEr. Rarity is counted in the references of these items,
    so a score depends on all of them and is 0 for a single item.

    Returns:
        Mean over items (NaN without any) and scores per item [N], between 0 and 10.

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
