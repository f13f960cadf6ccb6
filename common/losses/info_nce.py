"""Softmax contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce_per_anchor(positives: Tensor, negatives: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute each anchor's softmax cross entropy of positives against negatives, in nats.

    Positives don't compete with each other: the loss of positive `p` is `-log(exp(p) / (exp(p) + sum_k exp(n_k)))`,
    averaged over positives. Divide scores by the temperature first. `mask` selects the negatives (default: all). An
    anchor without negatives has zero loss.

    Shapes:
        positives [..., P]; negatives [..., K]; mask broadcasts to [..., K] -> [...]

    Examples:
        >>> query, key = torch.eye(3)[:2], torch.eye(3)[:2]
        >>> queue = torch.eye(3)[[2, 2, 2]]
        >>> info_nce_per_anchor((query * key).sum(1, keepdim=True) / 0.2, query @ queue.T / 0.2)
        tensor([0.0200, 0.0200])

    Source: van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", equation 4.
    """
    positives, negatives = at_least_float32(positives), at_least_float32(negatives)
    if mask is not None:
        # Finite, so that an anchor without negatives has zero gradient instead of NaN.
        negatives = negatives.masked_fill(~mask, torch.finfo(negatives.dtype).min / 2)
    log_noise = torch.logsumexp(negatives, dim=-1, keepdim=True)
    return F.softplus(log_noise - positives).mean(dim=-1)


def at_least_float32(scores: Tensor) -> Tensor:
    """Convert half precision to float32, and leave other types unchanged."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
