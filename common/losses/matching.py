"""Does a text belong to an image? Two-way classification of pairs, and a choice among candidates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32


def image_text_matching(logits: Tensor, matched: Tensor) -> Tensor:
    """Two-way cross entropy of pairs: 1 where text and image belong together, 0 where not (ITM).

    Args:
        logits: scores of "no" and "yes"; half precision is raised to float32.
        matched: which pairs belong together; bool, or int of 0 and 1.

    Shapes:
        logits [B, 2]; matched [B]

    Returns:
        Scalar loss in nats, averaged over the pairs.

    Source: Chen et al., "UNITER", section 3.2; docs/papers/m3p.md [14].
    """
    return F.cross_entropy(at_least_float32(logits), matched.long())


def candidate_matching(logits: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Find the true one of N candidates: softmax over the candidates, and a yes or no for each.

    Args:
        logits: score of each candidate; half precision is raised to float32.
        positive: position of the true one.

    Shapes:
        logits [G, N]; positive int64 [G]

    Returns:
        Cross entropy, averaged over the groups, and binary cross entropy, averaged over all candidates; in nats.

    Source: docs/papers/m3p.md [6.2] (MC-VLM).
    """
    logits = at_least_float32(logits)
    target = F.one_hot(positive, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(logits, positive), F.binary_cross_entropy_with_logits(logits, target)


def in_batch_matching(logits: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every image with every text of a batch of true pairs: `candidate_matching` both ways.

    Args:
        logits: score of image i with text j; the diagonal holds the true pairs. Half precision is raised to float32.
        group: pairs of equal numbers show the same thing, and one's image is no negative of another's text; of K
            numbers one that is equal is enough.

    Shapes:
        logits [B, B]; group [B] or [B, K]

    Returns:
        Cross entropy, averaged over both directions and the batch, and binary cross entropy, averaged over all pairs
        that count; in nats.

    Source: docs/papers/m3p.md [13.3].
    """
    if logits.dim() != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits must be [B, B], one row and one column per pair; got {tuple(logits.shape)}")
    logits = at_least_float32(logits)
    target = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    binary = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if group is None:
        binary = binary.mean()
    else:
        group = group.view(len(group), -1)
        counted = (group[:, None] != group[None, :]).all(2) | target.bool()
        binary = (binary * counted).sum() / counted.sum()
        # Finite, so that the gradient of a score that does not count is zero and never a NaN.
        logits = logits.masked_fill(~counted, torch.finfo(logits.dtype).min / 2)
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2, binary
