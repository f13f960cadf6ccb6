"""Momentum encoders: exponential moving averages of a network."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_average(averages: Iterable[Tensor], sources: Iterable[Tensor], momentum: float) -> None:
    """Apply average <- momentum * average + (1 - momentum) * source. Source: docs/papers/mct.md [6]."""
    averages = list(averages)
    if averages:
        torch._foreach_lerp_(averages, list(sources), 1.0 - momentum)


class MomentumPair(nn.Module):
    """A trained network and its moving average, such as an averaged generator.

    The average starts as an exact copy, receives no gradient, and is in training mode whenever the pair is. It never
    sees a batch, so its buffers are copies.

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
        """Update the average; call it once per iteration."""
        update_average(self.key.parameters(), self.query.parameters(), momentum)
        for target, source in zip(self.key.buffers(), self.query.buffers(), strict=True):
            target.copy_(source)
