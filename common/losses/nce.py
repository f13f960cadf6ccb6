"""Noise-contrastive estimation against a memory bank."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32


def nce_per_anchor(positives: Tensor, negatives: Tensor, normalizer: Tensor | float) -> Tensor:
    """Compute each anchor's binary noise-contrastive loss with uniformly drawn negatives, in nats.

    With `c = K * normalizer`, a positive score `p` costs `-log(exp(p) / (exp(p) + c))` and a negative score `n` costs
    `-log(c / (exp(n) + c))`. The loss averages over positives and sums over negatives. The caller averages over the
    batch. Divide scores by the temperature first. No gradient flows through `normalizer`, the model's partition
    constant. Softplus prevents overflow.

    Shapes:
        positives [..., P]; negatives [..., K]; normalizer [] -> [...]

    Examples:
        >>> positives, negatives = torch.tensor([[5.0]]), torch.zeros(1, 16)  # one anchor, divided by the temperature
        >>> nce_per_anchor(positives, negatives, estimate_normalizer(negatives))
        tensor([1.0724])

    Source: docs/papers/avid_cma.md [6].
    """
    positives, negatives = at_least_float32(positives), at_least_float32(negatives)
    normalizer = torch.as_tensor(normalizer, dtype=positives.dtype, device=positives.device).detach()
    log_noise = normalizer.log() + math.log(negatives.shape[-1])  # log(K * normalizer)
    return F.softplus(log_noise - positives).mean(dim=-1) + F.softplus(negatives - log_noise).sum(dim=-1)


def estimate_normalizer(negatives: Tensor) -> Tensor:
    """Estimate the partition constant from the first step's negatives: the mean of `exp(score)`.

    The result has no gradient. Divide scores by the temperature first. Average the result over ranks before you freeze
    it.

    Shapes:
        negatives [..., K] -> scalar

    Source: docs/papers/avid_cma.md [6].
    """
    # exp(1 / 0.07) is 1.6e6: float16 would overflow and bfloat16 would lose the sum over negatives.
    return at_least_float32(negatives.detach()).exp().mean()
