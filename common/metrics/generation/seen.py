"""Tracks the samples that a process has counted, so a sum over all processes has every sample once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from common.metrics.gathering import gather_rows


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

    def require_disjoint(self, device: torch.device | str | None = None) -> None:
        """Raise if two processes counted the same sample; the default device is the process group's."""
        if device is None and dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())  # of a process that saw no sample
        index = gather_rows(torch.tensor(sorted(self._known), dtype=torch.int64, device=device))
        if repeated := len(index) - len(torch.unique(index)):
            raise ValueError(
                f"two processes counted the same {repeated} samples: give every process different ones, as "
                "data_module.evaluation_loader does"
            )
