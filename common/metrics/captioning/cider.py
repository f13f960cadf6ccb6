"""CIDEr and CIDEr-D of captions (Vedantam et al., 2015) as coco-caption computes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.metrics.captioning.caption_set import CaptionSet, mean


def cider(
    captions: CaptionSet, orders: int = 4, clip: bool = True, sigma: float | None = 6.0
) -> tuple[float, NDArray[np.float64]]:
    """Cosine of the n-gram vectors of candidate and references, weighted by how rare an n-gram is.

    The defaults are CIDEr-D, which coco-caption and the papers call CIDEr; `clip=False, sigma=None` is plain CIDEr.
    Rarity is counted in the references of these items, so a score depends on all of them and is 0 for a single item.

    Args:
        clip: whether repeating an n-gram more often than the reference earns nothing.
        sigma: width of the Gaussian penalty on the difference in the number of bigrams; None for no penalty.

    Returns:
        Mean over items (NaN without any) and scores per item [N], between 0 and 10.

    Source: docs/papers/vx2text.md [11] (clipped counts, bigram lengths, sigma 6, log N - log df, times 10).
    """
    items, references = len(captions), len(captions.owner)
    similarity = np.zeros(references)
    for order in range(1, orders + 1):
        ngrams = captions.ngrams(order)
        rarity = np.log(max(items, 1)) - np.log(np.maximum(ngrams.document_frequency, 1))
        candidate = ngrams.candidate_count * rarity[ngrams.candidate_gram]
        reference = ngrams.reference_count * rarity[ngrams.reference_gram]
        candidate_square = np.bincount(ngrams.candidate_item, candidate**2, minlength=items)
        reference_square = np.bincount(ngrams.reference_row, reference**2, minlength=references)
        matched = ngrams.partner >= 0
        theirs, ours = reference[matched], candidate[ngrams.partner[matched]]
        product = (np.minimum(ours, theirs) if clip else ours) * theirs
        cosine = np.bincount(ngrams.reference_row[matched], product, minlength=references)
        norm = np.sqrt(candidate_square)[captions.owner] * np.sqrt(reference_square)
        similarity += np.divide(cosine, norm, out=np.zeros(references), where=norm > 0)
    if sigma is not None:
        bigrams, reference_bigrams = (np.maximum(length - 1, 0) for length in captions.lengths)
        difference = bigrams[captions.owner] - reference_bigrams
        similarity *= np.exp(-(difference**2) / (2 * sigma**2))
    times = np.bincount(captions.owner, minlength=items)
    score = 10 / orders * np.bincount(captions.owner, similarity, minlength=items) / times
    return mean(score), score
