"""Linear support vector machines on frozen features, and average precision per class.

This module doesn't import torch, so that worker processes start quickly.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def classify_windowed(
    train_rows: np.ndarray,
    test_rows: np.ndarray,
    label: np.ndarray,
    train_mask: np.ndarray,
    test_mask: np.ndarray,
    standardize_epsilon: float,
    options: Mapping[str, Any],
) -> np.ndarray:
    """Classify test samples of several windows each, with one-vs-rest linear SVMs on standardized features.

    A sample's class is the one with the highest mean decision value over its windows.

    Args:
        train_rows, test_rows: features [m, windows, dims] and [n, windows, dims].
        label: class of each training sample [m].
        train_mask [m], test_mask [n]: which samples to train on, and which to classify.
        standardize_epsilon: added to the standard deviation of every feature.
        options: further arguments of `sklearn.svm.LinearSVC`.

    Source: docs/papers/avid_cma.md [10.3].
    """
    # Imported here, because it takes half a second and planning doesn't need it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    windows, dims = train_rows.shape[1:]
    x = train_rows[train_mask].reshape(-1, dims)
    mean = x.mean(0, dtype=np.float64)
    if not np.isfinite(mean).all():
        raise ValueError("features: some are not finite; is the encoder's checkpoint damaged?")
    # This sum of squares needs no second array of the same size; float64 keeps it accurate.
    variance = np.einsum("nd,nd->d", x, x, dtype=np.float64) / len(x) - mean**2
    shift = mean.astype(np.float32)
    scale = (np.sqrt(np.maximum(variance, 0)) + standardize_epsilon).astype(np.float32)
    # In place, because indexing with a mask has copied x.
    x -= shift
    x /= scale
    machine = LinearSVC(dual=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        machine.fit(x, np.repeat(label[train_mask], windows))
    chosen = test_rows[test_mask]
    decision = machine.decision_function(((chosen - shift) / scale).reshape(-1, dims))
    if decision.ndim == 1:
        decision = np.stack([-decision, decision], axis=1)
    return machine.classes_[decision.reshape(*chosen.shape[:2], -1).mean(1).argmax(1)]


@dataclass(frozen=True)
class ClassVerdict:
    """Result for one class. Average precision and chosen C are NaN if `left_out` gives a reason to skip the class."""

    average_precision: float
    cost: float
    left_out: str = ""


def evaluate_class(
    train_rows: np.ndarray,
    train_labels: np.ndarray,
    test_rows: np.ndarray,
    test_labels: np.ndarray,
    costs: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
    folds: int = 3,
    positive_weight: float = 2.0,
    max_iterations: int = 2000,
    random_state: int = 0,
) -> ClassVerdict:
    """Fit a linear SVM for one class and measure its average precision.

    Chooses C by the mean average precision over stratified, unshuffled folds of the training samples. Difficult samples
    are negatives in training and ignored in the test. The class is left out if it has no positive test sample, or fewer
    than two positive or two negative training samples.

    Args:
        train_rows, test_rows: features [m, dims] and [n, dims].
        train_labels, test_labels: [m] and [n]: 1 for present, 0 for absent, -1 for difficult.
        costs: values of C to choose from. If several are equally good, the first is used.
        folds: folds of the cross-validation. Limited to the number of positives and the number of negatives.
        positive_weight: weight of a positive sample, relative to a negative one.

    Examples:
        >>> rows, labels = np.repeat([[1.0, 0.0], [0.0, 1.0]], 6, axis=0), np.repeat([1, 0], 6)
        >>> evaluate_class(rows, labels, rows, labels).average_precision
        1.0

    Source: docs/papers/mct.md [9].
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    if not (np.isfinite(train_rows).all() and np.isfinite(test_rows).all()):
        raise ValueError("features: some are not finite; is the encoder's checkpoint damaged?")
    target = np.where(np.asarray(train_labels) == 1, 1, -1)
    positives, negatives = int((target == 1).sum()), int((target == -1).sum())
    folds = min(folds, positives, negatives)
    if folds < 2:
        reason = f"{positives} positive and {negatives} negative training samples; two of each are needed"
        return ClassVerdict(float("nan"), float("nan"), reason)
    if not (np.asarray(test_labels) == 1).any():
        return ClassVerdict(float("nan"), float("nan"), "no positive test sample")

    def machine(cost: float) -> LinearSVC:
        weights = {1: positive_weight}
        return LinearSVC(C=cost, class_weight=weights, max_iter=max_iterations, random_state=random_state)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        quality = [
            cross_val_score(machine(cost), train_rows, target, cv=folds, scoring="average_precision").mean()
            for cost in costs
        ]
        cost = float(costs[int(np.argmax(quality))])
        decision = machine(cost).fit(train_rows, target).decision_function(test_rows)
    return ClassVerdict(average_precision(decision, test_labels), cost)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Compute the area under a class's precision-recall curve, as a sum over recalls without interpolation.

    Equal scores share a threshold, so a constant score gives the share of positives. NaN without positive samples.

    Args:
        labels: 1 for present, 0 for absent, -1 for difficult, [N]. Difficult samples are ignored.

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
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels[counted], scores[counted]))
