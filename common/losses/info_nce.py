"""Softmax contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(positives: Tensor, negatives: Tensor) -> Tensor:
    """Softmax cross entropy of each positive against the shared negatives.

    Every positive competes with the negatives only, never with the other positives: the loss of positive `p` is
    `-log(exp(p) / (exp(p) + sum_k exp(n_k)))`, averaged over positives and batch.

    Args:
        positives: scores of the positives, already divided by the temperature.
        negatives: scores of the negatives, already divided by the temperature.

    Shapes:
        positives [B, P]; negatives [B, K]

    Returns:
        Scalar loss in nats.

    Source: van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", equation 4.
    """
    return info_nce_per_anchor(positives, negatives).mean()


def info_nce_per_anchor(positives: Tensor, negatives: Tensor) -> Tensor:
    """`info_nce` before the average over the batch; half precision is raised to float32.

    Shapes:
        positives [..., P]; negatives [..., K] -> [...]
    """
    half = (torch.float16, torch.bfloat16)
    positives = positives.float() if positives.dtype in half else positives
    negatives = negatives.float() if negatives.dtype in half else negatives
    log_noise = torch.logsumexp(negatives, dim=-1, keepdim=True)
    return F.softplus(log_noise - positives).mean(dim=-1)
