"""Momentum encoders: exponential moving averages of a network."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_average(averages: Iterable[Tensor], sources: Iterable[Tensor], momentum: float) -> None:
    """Apply average <- momentum * average + (1 - momentum) * source. Source: docs/papers/mct.md [6]."""
    averages = list(averages)
    if averages:
        torch._foreach_lerp_(averages, list(sources), 1.0 - momentum)


class MomentumPair(nn.Module):
    """A trained network and its moving average.

    The average starts as an exact copy, receives no gradient, and is in training mode whenever the pair is: its batch
    normalization and running statistics use its own batches.

    Args:
        copy_buffers: also copy the trained network's buffers at every update. MoCo does not; averaged generators that
            never see a batch need it.

    Source: docs/papers/mct.md [6].
    """

    def __init__(self, query: nn.Module, copy_buffers: bool = False) -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.copy_buffers = copy_buffers

    def forward(self, *inputs: Any) -> Any:
        return self.query(*inputs)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Update the average; call it before the optimizer step."""
        update_average(self.key.parameters(), self.query.parameters(), momentum)
        if self.copy_buffers:
            self._copy(self.key.buffers(), self.query.buffers())

    @staticmethod
    def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
