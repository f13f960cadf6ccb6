"""Margin losses: a positive must exceed every negative by a margin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from common.losses.info_nce import at_least_float32

Reduction = Literal["sum", "mean", "max"]


def queue_hinge(
    positive: Tensor,
    negatives: Tensor,
    margin: float,
    reduction: Reduction = "sum",
    mask: Tensor | None = None,
) -> Tensor:
    """Compute each anchor's hinge loss `max(0, margin - positive + negative)`, reduced over the negatives.

    Computed in at least float32. An anchor without negatives has zero loss and gradient.

    Args:
        positive, negatives: similarities.
        reduction: `sum` or `mean` over the negatives, or `max` for the hardest negative.
        mask: True for the negatives to use; all by default.

    Shapes:
        positive [B]; negatives [B, K]; mask broadcasts to [B, K] -> [B]

    Examples:
        >>> positive, negatives = torch.tensor([0.9, 0.2]), torch.tensor([[0.1, 0.8], [0.1, 0.8]])
        >>> queue_hinge(positive, negatives, margin=0.2)
        tensor([0.1000, 0.9000])

    Source: docs/papers/mct.md [4] (J_ic and J_ci).
    """
    positive, negatives = at_least_float32(positive), at_least_float32(negatives)
    hinge = (negatives + (margin - positive)[:, None]).relu()
    if mask is not None:
        hinge = hinge.where(mask, 0.0)
    if reduction == "max":
        return hinge.max(dim=1).values
    total = hinge.sum(dim=1)
    if reduction == "sum":
        return total
    if mask is None:
        return total / negatives.shape[1]
    return total / mask.expand_as(hinge).to(total.dtype).sum(dim=-1).clamp(min=1)


def in_batch_hinge(scores: Tensor, margin: float, hardest: bool = False) -> Tensor:
    """Compute VSE++'s margin loss of a batch of matching pairs, summed over the batch and both directions.

    Entry (i, j) is the similarity of image i with text j; off-diagonal pairs are negatives. Computed in at least
    float32. `hardest` uses only the hardest negative of every image and every text.

    Shapes:
        scores [B, B] -> scalar

    Examples:
        >>> scores = torch.tensor([[0.9, 0.8], [0.1, 0.7]])  # image i with text j
        >>> in_batch_hinge(scores, margin=0.2)
        tensor(0.4000)

    Source: Faghri et al., "VSE++: Improving Visual-Semantic Embeddings with Hard Negatives", equations 5 and 6.
    """
    scores = at_least_float32(scores)
    pairs = scores.diagonal()
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    of_images = (scores + (margin - pairs)[:, None]).relu().masked_fill(own, 0.0)
    of_texts = (scores + (margin - pairs)[None, :]).relu().masked_fill(own, 0.0)
    if hardest:
        return of_images.max(dim=1).values.sum() + of_texts.max(dim=0).values.sum()
    return of_images.sum() + of_texts.sum()
