"""Linear support vector machines on frozen features.

Without torch, so that processes which fit machines side by side start quickly.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC


def classify_windowed(
    train_rows: np.ndarray,
    test_rows: np.ndarray,
    label: np.ndarray,
    learn: np.ndarray,
    judge: np.ndarray,
    standardise_epsilon: float,
    options: Mapping[str, Any],
) -> np.ndarray:
    """Classify samples seen as several windows by one-vs-rest linear machines on standardised features.

    Args:
        train_rows: [m, windows, dims].
        test_rows: [n, windows, dims].
        label: Classes of the training samples [m].
        learn: Which training samples to fit to, [m] booleans.
        judge: Which test samples to classify, [n] booleans.
        standardise_epsilon: Added to the standard deviation of every feature.
        options: Of ``sklearn.svm.LinearSVC``.

    Returns:
        The class with the highest mean decision value over the windows, for every sample to be classified.

    Raises:
        ValueError: A feature is not finite.

    Source: AVID-CMA, specification 10.3.
    """
    windows, dims = train_rows.shape[1:]
    x = train_rows[learn].reshape(-1, dims)
    mean = x.mean(0, dtype=np.float64)
    if not np.isfinite(mean).all():
        raise ValueError("features: some are not finite; is the checkpoint of the encoder sound?")
    # By the sum of squares, which needs no second array of this size; float64 keeps it exact enough.
    variance = np.einsum("nd,nd->d", x, x, dtype=np.float64) / len(x) - mean**2
    shift = mean.astype(np.float32)
    scale = (np.sqrt(np.maximum(variance, 0)) + standardise_epsilon).astype(np.float32)
    # A copy already, as chosen by a mask, so it may be changed.
    x -= shift
    x /= scale
    machine = LinearSVC(dual=True, intercept_scaling=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        machine.fit(x, np.repeat(label[learn], windows))
    judged = test_rows[judge]
    decision = machine.decision_function(((judged - shift) / scale).reshape(-1, dims))
    if decision.ndim == 1:
        decision = np.stack([-decision, decision], axis=1)
    return machine.classes_[decision.reshape(*judged.shape[:2], -1).mean(1).argmax(1)]
