"""Synthetic batches, made by a data module's `example_batch`, for estimates and measurements without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomTensors:
    """Makes random CPU tensors. With `empty`, makes zeros, which take no memory until they are read."""

    def __init__(self, empty: bool = False) -> None:
        self.empty = empty
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return self._zeros(shape) if self.empty else torch.randn(shape, generator=self._generator)

    def uniform(self, *shape: int) -> Tensor:
        return self._zeros(shape) if self.empty else torch.rand(shape, generator=self._generator)

    @staticmethod
    def _zeros(shape: tuple[int, ...]) -> Tensor:
        # Unlike NumPy, torch.zeros writes the zeros.
        return torch.from_numpy(np.zeros(shape, np.float32))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw uniform random integers in [low, high), int64."""
        return torch.randint(low, max(high, low + 1), shape, generator=self._generator)


@dataclass(frozen=True)
class Example:
    """Synthetic batch that replaces a data module in training.

    Attributes:
        batch: collated batch of one device.
        batches: number of batches per epoch for a data set of the published size. None if unknown.
        facts: data module attributes that the model reads after setup.
    """

    batch: Any
    batches: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)


def batches_of_epoch(items: int | None, global_batch: int) -> int | None:
    """Return the number of whole batches per epoch, at least 1, or None if the number of items is unknown."""
    return None if items is None else max(items // global_batch, 1)
