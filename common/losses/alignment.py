"""Word-region alignment by optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32

#: Added to denominators at padded positions. The numerators are zero there.
_PADDED = 1e4


def word_region_alignment(
    words: Tensor,
    regions: Tensor,
    word_mask: Tensor,
    region_mask: Tensor,
    matched: Tensor,
) -> Tensor:
    """Align words with regions in matching pairs, and separate them in other pairs (word-region alignment, WRA).

    Adds the distances of matching pairs, subtracts the distances of other pairs, and divides by the number of pairs.
    UNITER and ViLT give this loss the weight 0.1. UNITER's masks include special tokens; ViLT's don't.

    Shapes:
        words [B, L, D]; regions [B, R, D]; word_mask bool [B, L]; region_mask bool [B, R]; matched [B] -> scalar

    Examples:
        >>> words, regions = torch.eye(4)[None, :2], torch.eye(4)[None, :3]  # one pair, 2 words and 3 regions
        >>> masks = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
        >>> word_region_alignment(words, regions, *masks, matched=torch.tensor([True]))
        tensor(0.3333)

    Source: Chen et al., "UNITER", section 3.2 and its code; docs/papers/m3p.md [14].
    """
    distance = word_region_distance(words, regions, word_mask, region_mask)
    sign = matched.to(distance.dtype) * 2 - 1
    return (distance * sign).sum() / max(len(distance), 1)


def word_region_distance(
    words: Tensor,
    regions: Tensor,
    word_mask: Tensor,
    region_mask: Tensor,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    """Compute each pair's cost of optimal transport from words to regions. Zero if there are no words or no regions.

    Gradients flow through the costs, not through the plan. Half precision is converted to float32.

    Shapes:
        words [B, L, D]; regions [B, R, D]; masks [B, L] and [B, R] -> [B]
    """
    with torch.autocast(words.device.type, enabled=False):
        cost = cosine_costs(words, regions, word_mask, region_mask)
        plan = transport_plan(cost.detach(), word_mask, region_mask, beta, iterations)
        return torch.einsum("blr,brl->b", cost, plan)


def cosine_costs(words: Tensor, regions: Tensor, word_mask: Tensor, region_mask: Tensor) -> Tensor:
    """Compute 1 - cosine for each word and region of a pair, from 0 to 2. Zero if one is masked out.

    Shapes:
        words [B, L, D]; regions [B, R, D]; masks [B, L] and [B, R] -> [B, L, R], at least float32
    """
    words, regions = at_least_float32(words), at_least_float32(regions)
    cosines = torch.bmm(F.normalize(words, dim=2, eps=1e-5), F.normalize(regions, dim=2, eps=1e-5).mT)
    return torch.where(word_mask[:, :, None] & region_mask[:, None, :], 1 - cosines, 0.0)


def transport_plan(
    cost: Tensor, word_mask: Tensor, region_mask: Tensor, beta: float = 0.5, iterations: int = 50
) -> Tensor:
    """Compute the transport plan between uniformly weighted words and regions with IPOT, without gradient.

    The sum of every unmasked column is 1 / words. The sum of every unmasked row converges to 1 / regions.

    Args:
        cost: cost of each word and region, zero where masked out.
        beta: step size. A smaller value needs fewer iterations and gives a sharper plan.

    Shapes:
        cost [B, L, R]; word_mask bool [B, L]; region_mask bool [B, R] -> [B, R, L]

    Source: Xie et al., "A Fast Proximal Point Method for Computing Exact Wasserstein Distance", algorithm 1;
    docs/papers/m3p.md [14].
    """
    with torch.no_grad():
        both = (region_mask[:, :, None] & word_mask[:, None, :]).to(cost.dtype)
        kernel = torch.exp(cost.mT / -beta) * both
        count_words = word_mask.sum(dim=1, dtype=cost.dtype).clamp(min=1)[:, None]
        count_regions = region_mask.sum(dim=1, dtype=cost.dtype).clamp(min=1)[:, None]
        # If a pair has no words or no regions, there is nothing to transport.
        padded_words = torch.where(both.any(dim=1), 0.0, _PADDED).to(cost.dtype)
        padded_regions = torch.where(both.any(dim=2), 0.0, _PADDED).to(cost.dtype)
        sigma = word_mask.to(cost.dtype) / count_words
        plan = both
        for _ in range(iterations):
            kernel_now = kernel * plan
            delta = 1 / (count_regions * torch.bmm(kernel_now, sigma[:, :, None])[:, :, 0] + padded_regions)
            sigma = 1 / (count_words * torch.bmm(delta[:, None], kernel_now)[:, 0] + padded_words)
            plan = delta[:, :, None] * kernel_now * sigma[:, None, :]
        return plan
