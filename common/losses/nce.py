"""Noise-contrastive estimation against a memory bank."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32


def nce(positives: Tensor, negatives: Tensor, normalizer: Tensor | float) -> Tensor:
    """Binary noise-contrastive loss of scores against uniformly drawn negatives.

    With `c = K * normalizer`, a positive score `p` costs `-log(exp(p) / (exp(p) + c))` and a negative score `n`
    costs `-log(c / (exp(n) + c))`. Positives are averaged, negatives are summed, and the batch is averaged.

    Args:
        positives: scores of the positives, already divided by the temperature.
        negatives: scores of the negatives, already divided by the temperature.
        normalizer: partition constant of the model; no gradient flows through it.

    Shapes:
        positives [B, P]; negatives [B, K]; normalizer []

    Returns:
        Scalar loss in nats.

    Source: docs/papers/avid_cma.md [6].
    """
    return nce_per_anchor(positives, negatives, normalizer).mean()


def nce_per_anchor(positives: Tensor, negatives: Tensor, normalizer: Tensor | float) -> Tensor:
    """`nce` before the average over the batch.

    Both logarithms are evaluated as softplus, so no score can overflow; half precision is raised to float32.

    Shapes:
        positives [..., P]; negatives [..., K]; normalizer [] -> [...]
    """
    positives, negatives = at_least_float32(positives), at_least_float32(negatives)
    normalizer = torch.as_tensor(normalizer, dtype=positives.dtype, device=positives.device).detach()
    log_noise = normalizer.log() + math.log(negatives.shape[-1])  # log(K * normalizer)
    return F.softplus(log_noise - positives).mean(dim=-1) + F.softplus(negatives - log_noise).sum(dim=-1)


def estimate_normalizer(negatives: Tensor) -> Tensor:
    """Mean exponentiated negative score: the partition constant of the first step.

    Args:
        negatives: scores of the negatives, already divided by the temperature.

    Shapes:
        negatives [..., K]

    Returns:
        Scalar, without gradient. Average it over ranks before it is frozen.

    Source: docs/papers/avid_cma.md [6].
    """
    # exp(1 / 0.07) is 1.6e6: float16 would overflow and bfloat16 would lose the sum over negatives.
    return at_least_float32(negatives.detach()).exp().mean()
