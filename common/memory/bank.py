"""Memory bank: one stored unit vector per data set item."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.memory.collective import Replicated


class MemoryBank(Replicated):
    """Stores a unit vector per item, which is a moving average of the item's embeddings.

    Every rank holds the full bank and writes the embeddings of all ranks. So all copies stay equal, and only the start
    needs a broadcast. `momentum`, from 0 to 1, is the weight of the old row in a write.

    Examples:
        >>> bank = MemoryBank(num_items=100, dim=8)
        >>> item = torch.tensor([7])
        >>> bank.write(item, F.normalize(torch.randn(1, 8), dim=1))
        >>> bank.lookup(item).shape
        torch.Size([1, 8])

    Source: docs/papers/avid_cma.md [4].
    """

    vectors: Tensor

    def __init__(self, num_items: int, dim: int, momentum: float = 0.5) -> None:
        super().__init__()
        self.dim = dim
        self.momentum = momentum
        self.register_buffer("vectors", F.normalize(torch.randn(num_items, dim), dim=1))

    def lookup(self, index: Tensor) -> Tensor:
        """Return copies of the rows of some items, without gradient; index [...] -> [..., d]."""
        rows = self.vectors.index_select(0, index.reshape(-1))
        return rows.view(*index.shape, self.dim)

    @torch.no_grad()
    def write(self, index: Tensor, embeddings: Tensor) -> None:
        """Update the rows of a batch: row <- normalize(m * row + (1 - m) * embedding).

        Takes the unit embeddings of all ranks, in rank order. If an item repeats, only the last embedding counts.

        Shapes:
            index [B]; embeddings [B, d]
        """
        old = self.vectors.index_select(0, index)
        new = F.normalize(torch.lerp(embeddings, old, self.momentum), dim=1)
        # All occurrences of an item write the same values, so the order of writes does not matter.
        self.vectors.index_copy_(0, index, new.index_select(0, last_occurrence(index)))


def last_occurrence(index: Tensor) -> Tensor:
    """Return the last position of each entry's value in `index`, [M] -> [M]. Doesn't wait for the GPU."""
    order = torch.argsort(index, stable=True)
    return order[torch.searchsorted(index[order], index, right=True) - 1]
