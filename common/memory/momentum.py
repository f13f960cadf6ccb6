"""MoCo's momentum encoder, and shuffling BN, which normalizes a key and its query in different groups."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.memory.collective import all_gather_concat, broadcast_from_rank_zero, rank, world_size


@torch.no_grad()
def update_average(averages: Iterable[Tensor], sources: Iterable[Tensor], momentum: float) -> None:
    """Set each average to momentum * average + (1 - momentum) * source. Source: docs/papers/mct.md [6]."""
    averages = list(averages)
    if averages:
        torch._foreach_lerp_(averages, list(sources), 1.0 - momentum)


class MomentumPair(nn.Module):
    """A network and the moving average of its weights.

    The average starts as an exact copy and receives no gradient. Buffers are copied, not averaged. The average has the
    same training mode as the pair.

    Examples:
        >>> pair = MomentumPair(nn.Linear(4, 2))
        >>> pair.update(momentum=0.999)  # after each optimizer step
        >>> pair.key(torch.ones(1, 4)).shape
        torch.Size([1, 2])
    """

    def __init__(self, query: nn.Module) -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(False)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Update the average. Call this once per iteration."""
        update_average(self.key.parameters(), self.query.parameters(), momentum)
        for target, source in zip(self.key.buffers(), self.query.buffers(), strict=True):
            target.copy_(source)


def order_over_groups(rows: Tensor) -> Tensor:
    """Draw a random order of the global batch. The resulting groups don't depend on the number of devices.

    Rank r of W encodes positions r, r + W, ... of this order.
    """
    ranks, own = world_size(), len(rows)
    order = torch.randperm(ranks * own, device=rows.device)
    broadcast_from_rank_zero(order)
    # Sample i is row i // W of rank i % W, and rows are gathered rank by rank.
    gathered = order % ranks * own + order // ranks
    return gathered.view(own, ranks).T.flatten()


@torch.no_grad()
def batch_shuffle(rows: Tensor, permutation: Tensor) -> Tensor:
    """Permute the rows of all ranks.

    Shapes:
        rows [N, ...] with the same N on all ranks; permutation [W * N], the same on all ranks -> [N, ...]

    Examples:
        >>> rows, order = torch.arange(4.0)[:, None], torch.tensor([2, 0, 3, 1])
        >>> batch_unshuffle(batch_shuffle(rows, order), order).flatten()
        tensor([0., 1., 2., 3.])

    Source: docs/papers/mct.md [6].
    """
    shuffled = all_gather_concat(rows).index_select(0, _own_part(permutation))
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        shuffled = shuffled.contiguous(memory_format=torch.channels_last)  # gathering loses the layout
    return shuffled


@torch.no_grad()
def batch_unshuffle(rows: Tensor, permutation: Tensor) -> Tensor:
    """Undo `batch_shuffle`: return every rank's original rows in the original order."""
    return all_gather_concat(rows).index_select(0, _own_part(permutation.argsort()))


def _own_part(order: Tensor) -> Tensor:
    return order.view(world_size(), -1)[rank()]
