"""Tracks the samples that a process has counted, so a sum over all processes has every sample once."""

from __future__ import annotations

import torch
from torch import Tensor

from common.metrics.gathering import gather_objects


class Seen:
    """Indices of the samples that are already in a running sum, which cannot drop them again.

    Repeats within a process are skipped, and processes must have different samples, as our samplers ensure. The caller
    drops rows that replace a broken file, because another process may have them.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()

    def fresh(self, index: Tensor) -> Tensor:
        """Positions [b] of the first row of every new sample in `index` [B], ascending, on the CPU; marks them seen."""
        chosen = []
        for position, item in enumerate(index.tolist()):
            if item not in self._known:
                self._known.add(item)
                chosen.append(position)
        return torch.tensor(chosen, dtype=torch.int64)

    def require_disjoint(self) -> None:
        """Raise if two processes counted the same sample."""
        index = gather_objects(list(self._known))
        if repeated := len(index) - len(set(index)):
            raise ValueError(
                f"two processes counted the same {repeated} samples: give every process different ones, as "
                "data_module.evaluation_loader does"
            )
