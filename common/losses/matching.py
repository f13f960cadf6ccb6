"""Image-text matching: classify pairs as matching or not, or choose among candidates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32


def image_text_matching(logits: Tensor, matched: Tensor) -> Tensor:
    """Compute the mean cross entropy of pairs labeled as matching (1) or not (0), in nats (image-text matching, ITM).

    Shapes:
        logits [B, 2] for "no" and "yes"; matched [B], bool or 0 and 1 -> scalar

    Examples:
        >>> image_text_matching(logits=torch.tensor([[0.0, 2.0], [2.0, 0.0]]), matched=torch.tensor([1, 0]))
        tensor(0.1269)

    Source: Chen et al., "UNITER", section 3.2; docs/papers/m3p.md [14].
    """
    return F.cross_entropy(at_least_float32(logits), matched.long())


def candidate_matching(logits: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Compute two losses for finding the true candidate in each group, in nats.

    Returns the softmax cross entropy, averaged over groups, and the binary cross entropy, averaged over candidates.

    Shapes:
        logits [G, N]; positive (index of the true candidate) int64 [G] -> two scalars

    Examples:
        >>> candidate_matching(logits=torch.tensor([[2.0, 0.0, 0.0]]), positive=torch.tensor([0]))
        (tensor(0.2395), tensor(0.5044))

    Source: docs/papers/m3p.md [6.2] (MC-VLM).
    """
    logits = at_least_float32(logits)
    target = F.one_hot(positive, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(logits, positive), F.binary_cross_entropy_with_logits(logits, target)


def in_batch_matching(logits: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Apply `candidate_matching` to a batch of true pairs, to find each image's text and each text's image.

    Row i of `logits` is image i, column j is text j. Two pairs with the same value in any of the K columns of `group`
    show the same thing, so they are not used as negatives.

    Shapes:
        logits [B, B]; group [B] or [B, K] -> two scalars

    Examples:
        >>> in_batch_matching(logits=2 * torch.eye(3))
        (tensor(0.2395), tensor(0.5044))

    Source: docs/papers/m3p.md [13.3].
    """
    logits = at_least_float32(logits)
    target = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    binary = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if group is None:
        binary = binary.mean()
    else:
        group = group.view(len(group), -1)
        counted = (group[:, None] != group[None, :]).all(2) | target.bool()
        binary = (binary * counted).sum() / counted.sum()
        # Finite, so that excluded scores have zero gradient instead of NaN.
        logits = logits.masked_fill(~counted, torch.finfo(logits.dtype).min / 2)
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2, binary
