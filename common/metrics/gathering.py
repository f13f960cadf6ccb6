"""Collect per-sample results of all processes, and count each sample once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from common.memory.collective import is_distributed, world_size


def gather_objects(values: list[Any]) -> list[Any]:
    """Gather the values of all processes in rank order with pickle. Each process may have any number of values.

    Moves tensors to the CPU if there are several processes.
    """
    if not is_distributed():
        return values
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    # Unpickling a GPU tensor would move it to the GPU of the same number.
    dist.all_gather_object(parts, tree_map_only(Tensor, Tensor.cpu, values))
    return [value for part in parts for value in part]


def gather_rows(rows: Tensor) -> Tensor:
    """Gather rows [n, ...] of all processes in rank order, [sum of n, ...]. Each process may have any `n`, even 0."""
    return torch.cat(gather_objects([rows])).to(rows.device)


def first_occurrences(index: Tensor) -> Tensor:
    """Return the first position of each value in `index` [n], in ascending order of the m values, [m]."""
    ordered, position = torch.sort(index, stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return position[is_first]


class OncePerSample:
    """Computes means over samples. Every sample has the same weight, no matter how often it occurs.

    A sample can occur several times: samplers repeat samples so that all processes have the same number, and loaders
    replace broken files. Values with the same index are first averaged over all processes. So several clips of a video
    may also have the same index.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._batches: list[tuple[Tensor, Tensor]] = []

    def update(self, index: Tensor, **values: Tensor) -> None:
        """Add samples [B] with a value per sample [B] for each name."""
        rows = torch.stack([values[name].detach().double() for name in self.names], dim=1)
        self._batches.append((index.clone(), rows))  # a tensor from a loader process keeps a file open

    def compute(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the float64 means over all samples (NaN without samples), and `count`."""
        none = torch.zeros(0, len(self.names), dtype=torch.float64, device=device)
        batches = [(none[:, 0].long(), none), *_gathered(self._batches)]
        index, values = _joined(batches, device)
        samples, position, times = torch.unique(index, return_inverse=True, return_counts=True)
        per_sample = values.new_zeros(len(samples), len(self.names)).index_add_(0, position, values) / times[:, None]
        means = dict(zip(self.names, per_sample.mean(0)))
        means["count"] = torch.tensor(float(len(samples)), dtype=torch.float64, device=values.device)
        return means


class RowsOncePerSample:
    """Collects a row per sample over batches and processes. If a sample repeats, keeps the first row."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._batches: list[tuple[Tensor, ...]] = []

    def update(self, index: Tensor, **rows: Tensor) -> None:
        """Add samples [B] with a tensor [B, ...] per name. Trailing shape and type must be the same in every batch."""
        self._batches.append((index.clone(), *(rows[name].detach().clone() for name in self.names)))

    def compute(self, device: torch.device | str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
        """Return the ascending sample indices [N] and the rows [N, ...] of each name."""
        batches = _gathered(self._batches)
        if not batches:
            raise ValueError("there is no sample to evaluate")
        index, *rows = _joined(batches, device)
        first = first_occurrences(index)
        if not torch.equal(first, torch.arange(len(index), device=first.device)):  # one process: no copy
            index, *rows = index[first], *(part[first] for part in rows)
        return index, dict(zip(self.names, rows))


def _gathered(batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Gather the batches of all processes. Join batches first, because every tensor is pickled separately."""
    joined = is_distributed() and batches
    return gather_objects([tuple(torch.cat(parts) for parts in zip(*batches))] if joined else [*batches])


def _joined(batches: Sequence[tuple[Tensor, ...]], device: torch.device | str) -> list[Tensor]:
    return [torch.cat([part.to(device) for part in parts]) for parts in zip(*batches)]


class Seen:
    """Remembers the samples that a running sum has counted, so that no sample counts twice.

    Skips repeats within a process. Processes must have different samples; our samplers ensure that. The caller must
    drop rows that replace a broken file, because another process may have counted them.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()

    def fresh(self, index: Tensor) -> Tensor:
        """Mark samples `index` [B] as seen. Return the first row number of each new sample, ascending, on the CPU."""
        chosen = []
        for position, item in enumerate(index.tolist()):
            if item not in self._known:
                self._known.add(item)
                chosen.append(position)
        return torch.tensor(chosen, dtype=torch.int64)

    def require_disjoint(self) -> None:
        """Check that no two processes counted the same sample, or raise."""
        index = gather_objects(list(self._known))
        if repeated := len(index) - len(set(index)):
            raise ValueError(
                f"two processes counted the same {repeated} samples: give every process different ones, as "
                "data_module.evaluation_loader does"
            )
