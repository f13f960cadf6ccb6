"""Which samples a process has counted, so that a sum over all processes has every sample once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from common.metrics.gathering import gather_rows


class Seen:
    """Indices of the samples that sums already hold.

    Sums keep no rows, so a sample cannot be taken out again: within a process a second row of a sample is refused
    when it comes, and two processes must bring different samples. The samplers of the suite see to that; rows that
    stand in for a broken file, which their neighbor's process may bring as well, are left out by the caller.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()

    def fresh(self, index: Tensor) -> Tensor:
        """Positions of the rows to count: the first of every sample that was not there before; they now were.

        Args:
            index: which samples [B].

        Returns:
            Positions [b] int64, ascending, on the CPU.
        """
        chosen = []
        for position, item in enumerate(index.tolist()):
            if item not in self._known:
                self._known.add(item)
                chosen.append(position)
        return torch.tensor(chosen, dtype=torch.int64)

    def require_disjoint(self, device: torch.device | str | None = None) -> int:
        """Number of samples of all processes.

        Args:
            device: where to collect; None for that of the process group.
        """
        if device is None and dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())  # of a process that saw no sample
        index = gather_rows(torch.tensor(sorted(self._known), dtype=torch.int64, device=device))
        distinct = len(torch.unique(index))
        if distinct != len(index):
            raise ValueError(
                f"{len(index) - distinct} samples were counted by two processes, and sums cannot forget them: give "
                "every process other samples, as data_module.evaluation_loader does"
            )
        return distinct
