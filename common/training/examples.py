"""Synthetic batches from a data module's `example_batch`, for estimates and measurements without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class RandomTensors:
    """Makes random CPU tensors, or with `empty` zeros, which take no memory until they are read."""

    def __init__(self, empty: bool = False) -> None:
        self.empty = empty
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.zeros(shape) if self.empty else torch.randn(shape, generator=self._generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.zeros(shape) if self.empty else torch.rand(shape, generator=self._generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw uniform int64 in [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, generator=self._generator)


@dataclass(frozen=True)
class Example:
    """Replaces a data module in training.

    Attributes:
        batch: batch of one device, as collated.
        batches: number per epoch at the published size of the data set; None if unknown.
        facts: data module attributes that the model reads after setup.
    """

    batch: Any
    batches: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)


def batches_of_epoch(items: int | None, global_batch: int) -> int | None:
    """Return the number of whole batches per epoch, at least one; None if the number of items is unknown."""
    return None if items is None else max(items // global_batch, 1)
