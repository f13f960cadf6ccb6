"""CIDEr-D of captions (Vedantam et al., 2015) as coco-caption computes it."""

from __future__ import annotations

import numpy as np

from common.metrics.captioning.caption_set import ORDERS, CaptionSet, Floats, mean

#: Width of the Gaussian penalty on the difference in the number of bigrams.
_SIGMA = 6.0


def cider(captions: CaptionSet) -> tuple[float, Floats]:
    """Cosine of the n-gram vectors of candidate and references, weighted by how rare an n-gram is.

    This is CIDEr-D, which coco-caption and the papers call CIDEr. Rarity is counted in the references of these items,
    so a score depends on all of them and is 0 for a single item.

    Returns:
        Mean over items (NaN without any) and scores per item [N], between 0 and 10.

    Source: docs/papers/vx2text.md [11] (clipped counts, bigram lengths, sigma 6, log N - log df, times 10).
    """
    items, references = len(captions), len(captions.owner)
    similarity = np.zeros(references)
    for order in range(1, ORDERS + 1):
        ngrams = captions.ngrams[order]
        rarity = np.log(max(items, 1)) - np.log(np.maximum(ngrams.document_frequency, 1))
        candidate = ngrams.candidate_count * rarity[ngrams.candidate_gram]
        reference = ngrams.reference_count * rarity[ngrams.reference_gram]
        candidate_square = np.bincount(ngrams.candidate_item, candidate**2, minlength=items)
        reference_square = np.bincount(ngrams.reference_row, reference**2, minlength=references)
        matched = ngrams.partner >= 0
        theirs, ours = reference[matched], candidate[ngrams.partner[matched]]
        cosine = np.bincount(ngrams.reference_row[matched], np.minimum(ours, theirs) * theirs, minlength=references)
        norm = np.sqrt(candidate_square)[captions.owner] * np.sqrt(reference_square)
        similarity += np.divide(cosine, norm, out=np.zeros(references), where=norm > 0)
    bigrams, reference_bigrams = (np.maximum(length - 1, 0) for length in captions.lengths)
    difference = bigrams[captions.owner] - reference_bigrams
    similarity *= np.exp(-(difference**2) / (2 * _SIGMA**2))
    score = 10 / ORDERS * np.bincount(captions.owner, similarity) / np.bincount(captions.owner)
    return mean(score), score
