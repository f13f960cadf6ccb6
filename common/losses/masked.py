"""Losses for predicting masked words, and features or classes of masked regions. Zero if nothing is masked."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32

#: `element` averages the divergence over masked regions and classes, `batch` over masked regions.
Reduction = Literal["element", "batch"]


def masked_language_modeling(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross entropy of the masked words, in nats.

    Shapes:
        logits [K, V] over the vocabulary; targets int64 [K] -> scalar

    Examples:
        >>> masked_language_modeling(logits=torch.zeros(2, 10), targets=torch.tensor([3, 7]))  # log 10
        tensor(2.3026)

    Source: Devlin et al., "BERT"; docs/papers/m3p.md [14].
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits, targets, reduction="sum") / max(len(targets), 1)


def masked_region_regression(predictions: Tensor, features: Tensor) -> Tensor:
    """Compute the mean squared error of masked regions' features (MRFR).

    Shapes:
        predictions [K, F]; the detector's features [K, F] -> scalar

    Examples:
        >>> masked_region_regression(predictions=torch.zeros(2, 4), features=torch.ones(2, 4))
        tensor(1.)

    Source: Chen et al., "UNITER", section 3.2; docs/papers/m3p.md [14].
    """
    predictions, features = at_least_float32(predictions), at_least_float32(features)
    return F.mse_loss(predictions, features, reduction="sum") / max(features.numel(), 1)


def masked_region_classification(logits: Tensor, classes: Tensor) -> Tensor:
    """Compute the mean cross entropy of masked regions against the detector's classes, in nats (MRC).

    Shapes:
        logits [K, C]; classes int64 [K] -> scalar

    Source: Chen et al., "UNITER", section 3.2; docs/papers/m3p.md [14].
    """
    return masked_language_modeling(logits, classes)


def masked_region_kl(logits: Tensor, distribution: Tensor, reduction: Reduction = "element") -> Tensor:
    """Compute KL(p || q) of the detector's class distribution p and the prediction q, in nats (MRC-KL).

    Args:
        distribution: p, including the background.
        reduction: `element` averages over regions and classes, like UNITER's code. `batch` averages over regions only;
            this is the true divergence and C times as large.

    Shapes:
        logits [K, C]; distribution [K, C] -> scalar

    Examples:
        >>> masked_region_kl(torch.zeros(1, 2), distribution=torch.tensor([[1.0, 0.0]]), reduction="batch")  # log 2
        tensor(0.6931)

    Source: Chen et al., "UNITER", section 3.2; docs/papers/m3p.md [14].
    """
    logits, distribution = at_least_float32(logits), at_least_float32(distribution)
    total = F.kl_div(F.log_softmax(logits, dim=-1), distribution, reduction="sum")
    return total / max(distribution.numel() if reduction == "element" else len(distribution), 1)
