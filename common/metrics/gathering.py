"""Collects per-sample results of all processes, each sample once."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.memory.collective import is_distributed, world_size


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [n, ...] of all processes in rank order, [sum of n, ...] on every process; `n` may differ and be 0."""
    if not is_distributed():
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    lengths = [int(one) for one in counts]
    # Collectives need equal shapes: pad to the longest length, and cut the padding off again.
    padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths)])


def gather_objects(values: list[Any]) -> list[Any]:
    """Pickled values of all processes in rank order; their number may differ and be 0."""
    if not is_distributed():
        return values
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def first_occurrences(index: Tensor) -> Tensor:
    """Positions [m] of the first occurrence of every value in `index` [n], in ascending order of the value."""
    ordered, position = torch.sort(index, stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return position[is_first]


class OncePerSample:
    """Means of per-sample values; every sample has the same weight, however often it was seen.

    Samplers repeat samples to give every process the same number, and loaders replace broken files with others.
    Values of one index are averaged first, over all processes, so an index may also repeat on purpose (clips of a
    video).
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._indices: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, index: Tensor, **values: Tensor) -> None:
        """Add samples [B] with one value [B] per name."""
        self._indices.append(index.clone())  # a tensor of a loader process keeps a file open
        self._values.append(torch.stack([values[name].detach().double() for name in self.names], dim=1))

    def compute(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Float64 means over all samples, NaN without any, and `count`; a process without samples may need `device`."""
        if self._indices:
            index, values = torch.cat(self._indices), torch.cat(self._values)
        else:
            index = torch.zeros(0, dtype=torch.int64, device=device)
            values = torch.zeros(0, len(self.names), dtype=torch.float64, device=device)
        index, values = gather_rows(index), gather_rows(values)
        samples, position, times = torch.unique(index, return_inverse=True, return_counts=True)
        per_sample = values.new_zeros(len(samples), len(self.names)).index_add_(0, position, values) / times[:, None]
        means = dict(zip(self.names, per_sample.mean(0)))
        means["count"] = torch.tensor(float(len(samples)), dtype=torch.float64, device=values.device)
        return means


class RowsOncePerSample:
    """One row per sample from all batches and processes, ascending; the first row of a repeated sample counts."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._indices: list[Tensor] = []
        self._rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def update(self, index: Tensor, **rows: Tensor) -> None:
        """Add samples [B] with a tensor [B, ...] per name; trailing shapes and types are constant."""
        self._indices.append(index.clone())
        for name in self.names:
            self._rows[name].append(rows[name].detach().clone())

    def compute(self, device: torch.device | str | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Ascending positions [N] and rows [N, ...] by name; a process without samples may need `device`."""
        own = {name: (rows[0].shape[1:], rows[0].dtype) for name, rows in self._rows.items() if rows}
        # A process without samples does not know the shapes, but must take part in the collective.
        shapes: dict[str, Any] = next((shapes for shapes in gather_objects([own]) if shapes), {})
        if not shapes:
            raise ValueError("there is no sample to evaluate")
        if not self._indices:
            self._indices.append(torch.zeros(0, dtype=torch.int64, device=device))
            for name, (shape, dtype) in shapes.items():
                self._rows[name].append(torch.zeros(0, *shape, dtype=dtype, device=device))
        index = gather_rows(torch.cat(self._indices))
        first = first_occurrences(index)
        in_order = torch.equal(first, torch.arange(len(index), device=first.device))  # of one process: saves a copy

        def once(rows: Tensor) -> Tensor:
            return rows if in_order else rows[first]

        return once(index), {name: once(gather_rows(torch.cat(rows))) for name, rows in self._rows.items()}
