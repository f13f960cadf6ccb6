"""Predict what was masked: words by their number, regions by their feature or their class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32

#: What the divergence is averaged over: masked regions times classes, or masked regions.
Reduction = Literal["element", "batch"]


def masked_language_modeling(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the masked words, averaged over them.

    Args:
        logits: scores of the whole vocabulary at the masked places; half precision is raised to float32.
        targets: numbers of the words that stood there.

    Shapes:
        logits [K, V]; targets int64 [K]

    Returns:
        Scalar loss in nats; zero, with a gradient of zero, where nothing was masked.

    Source: Devlin et al., "BERT"; docs/papers/m3p.md [14].
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits, targets, reduction="sum") / max(len(targets), 1)


def masked_region_regression(predictions: Tensor, features: Tensor) -> Tensor:
    """Mean squared error of the features of masked regions, over regions and dimensions (MRFR).

    Args:
        predictions: what the model says.
        features: what the detector said.

    Shapes:
        predictions [K, F]; features [K, F]

    Returns:
        Scalar loss; zero, with a gradient of zero, where nothing was masked.

    Source: Chen et al., "UNITER", section 3.2; docs/papers/m3p.md [14].
    """
    predictions, features = at_least_float32(predictions), at_least_float32(features)
    return F.mse_loss(predictions, features, reduction="sum") / max(features.numel(), 1)


def masked_region_classification(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of the classes of masked regions, averaged over them (MRC).

    Args:
        logits: scores of the classes; half precision is raised to float32.
        classes: the detector's class of each region; see `foreground_classes` for one made of its distribution.

    Shapes:
        logits [K, C]; classes int64 [K]

    Returns:
        Scalar loss in nats; zero, with a gradient of zero, where nothing was masked.

    Source: Chen et al., "UNITER", section 3.2; docs/papers/m3p.md [14].
    """
    return masked_language_modeling(logits, classes)


def foreground_classes(distribution: Tensor, background: int = 0) -> Tensor:
    """The detector's most probable class of each region, the background left out.

    Shapes:
        distribution [..., C] -> int64 [...]

    Source: docs/papers/m3p.md [14], after UNITER's code.
    """
    return distribution.index_fill(-1, torch.tensor([background], device=distribution.device), -1.0).argmax(dim=-1)


def masked_region_kl(logits: Tensor, distribution: Tensor, reduction: Reduction = "element") -> Tensor:
    """Divergence of the predicted from the detector's distribution over classes, KL(p || q) (MRC-KL).

    Args:
        logits: scores of the classes, q before the softmax; half precision is raised to float32.
        distribution: the detector's p, the background included.
        reduction: `element` averages over regions times classes, as UNITER's code does; `batch` over regions, which
            is the divergence proper and C times as large.

    Shapes:
        logits [K, C]; distribution [K, C]

    Returns:
        Scalar loss in nats; zero, with a gradient of zero, where nothing was masked.

    Source: Chen et al., "UNITER", section 3.2; docs/papers/m3p.md [14].
    """
    logits, distribution = at_least_float32(logits), at_least_float32(distribution)
    total = F.kl_div(F.log_softmax(logits, dim=-1), distribution, reduction="sum")
    return total / max(distribution.numel() if reduction == "element" else len(distribution), 1)
