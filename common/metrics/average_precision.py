"""Average precision per class; without torch, since the support vector machines use it."""

import numpy as np
from sklearn.metrics import average_precision_score


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the precision-recall curve of one class, as a sum over the recalls (no interpolation).

    Ties are taken together, so a constant score gives the share of positives. NaN without a positive sample.

    Args:
        labels: [N]: 1 for present, 0 for absent, -1 for difficult; difficult samples are left out.

    Examples:
        >>> average_precision(scores=np.array([0.9, 0.8, 0.1]), labels=np.array([1, 0, 1]))
        0.8333333333333333

    Source: docs/papers/mct.md [9].
    """
    counted = labels != -1
    if not (labels == 1).any():
        return float("nan")
    if not np.isfinite(scores[counted]).all():
        raise ValueError("scores: some are not finite; is the checkpoint damaged?")
    return float(average_precision_score(labels[counted], scores[counted]))
