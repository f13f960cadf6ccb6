"""Word-region alignment by optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Added to denominators at padded places; their numerators are zero.
_PADDED = 1e4


def word_region_alignment(
    words: Tensor,
    regions: Tensor,
    word_mask: Tensor,
    region_mask: Tensor,
    matched: Tensor,
) -> Tensor:
    """Bring the words of matching pairs near their regions and those of other pairs away from them (WRA).

    The distances of the matching pairs minus those of the others, over the number of pairs. UNITER and ViLT use the
    weight 0.1; UNITER's masks count all tokens, ViLT's leave the special ones out.

    Shapes:
        words [B, L, D]; regions [B, R, D]; word_mask bool [B, L]; region_mask bool [B, R]; matched [B] -> scalar

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
    """Cost of the cheapest plan that moves the words of every pair to its regions; zero without words or regions.

    Gradient flows through the costs, not the plan. Float32 or float64, since half precision would lose the plan.

    Shapes:
        words [B, L, D]; regions [B, R, D]; masks [B, L] and [B, R] -> [B]
    """
    with torch.autocast(words.device.type, enabled=False):
        cost = cosine_costs(words, regions, word_mask, region_mask)
        plan = transport_plan(cost.detach(), word_mask, region_mask, beta, iterations)
        return torch.einsum("blr,brl->b", cost, plan)


def cosine_costs(words: Tensor, regions: Tensor, word_mask: Tensor, region_mask: Tensor) -> Tensor:
    """One minus the cosine of every word with every region of its pair, in [0, 2]; zero if one is masked out.

    Shapes:
        words [B, L, D]; regions [B, R, D]; masks [B, L] and [B, R] -> [B, L, R], float32 at least
    """
    dtype = torch.promote_types(words.dtype, torch.float32)
    cosines = torch.bmm(
        F.normalize(words.to(dtype), dim=2, eps=1e-5), F.normalize(regions.to(dtype), dim=2, eps=1e-5).mT
    )
    return torch.where(word_mask[:, :, None] & region_mask[:, None, :], 1 - cosines, 0.0)


def transport_plan(
    cost: Tensor, word_mask: Tensor, region_mask: Tensor, beta: float = 0.5, iterations: int = 50
) -> Tensor:
    """Plan between words and regions of equal weight each, by IPOT, for all pairs at once. Without gradient.

    After enough iterations unmasked rows sum to one over the pair's regions; unmasked columns do exactly, over its
    words.

    Args:
        cost: zero if masked out.
        beta: step; a smaller one needs fewer iterations and gives a harder plan.

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
        # If all of one side is padded, there is nothing to move.
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
