"""Collecting per-sample results of all processes, each sample once."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.memory.collective import is_distributed, world_size


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes in rank order; every process may bring another number of them, also none.

    Args:
        rows: [n, ...], with the same trailing shape and type on every process, on a device of the process group.

    Returns:
        [sum of n, ...] on every process; `rows` itself when there is one process.
    """
    if not is_distributed():
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    lengths = [int(one) for one in counts]
    # Collectives want equal shapes, so all bring the longest length and the padding is cut off again.
    padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths)])


def gather_objects(values: list[Any]) -> list[Any]:
    """Values of all processes in rank order; every process may bring another number of them, also none.

    Returns:
        The joined list on every process; `values` itself when there is one process.
    """
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
    """Means of per-sample values with every sample weighing the same, however often it was seen.

    A distributed sampler may repeat samples to give every process the same number, and a loader that meets a broken
    file delivers its neighbor twice. Both would weigh twice in an ordinary mean. Here values are kept by sample
    index, collected from all processes at the end, and the values of one index are averaged first. So an index may
    also come several times on purpose, once for each random clip of a video.

    Args:
        names: the values of one sample.

    Examples:
        >>> meter = OncePerSample("top1")
        >>> meter.update(torch.tensor([4, 7, 4]), top1=torch.tensor([1.0, 0.0, 1.0]))
        >>> meter.compute()["top1"].item()
        0.5
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._indices: list[Tensor] = []
        self._values: list[Tensor] = []

    def reset(self) -> None:
        """Forget everything."""
        self._indices.clear()
        self._values.clear()

    def update(self, index: Tensor, **values: Tensor) -> None:
        """Add samples.

        Args:
            index: which samples, [B].
            values: for every name one value a sample, [B].
        """
        if set(values) != set(self.names):
            raise ValueError(f"expected values for {sorted(self.names)}, got {sorted(values)}")
        self._indices.append(index.detach())
        self._values.append(torch.stack([values[name].detach().double() for name in self.names], dim=1))

    def compute(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The means over all samples of all processes; NaN where there is no sample.

        Args:
            device: where to collect; needed only by a process that may have seen no sample.

        Returns:
            For every name a float64 scalar. `count` gives the number of samples.
        """
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
    """Tensors with one row a sample, from all batches and processes, each sample once and in ascending order.

    A loader that meets a broken file delivers its neighbor twice; the second row is left out.

    Args:
        names: the tensors.

    Examples:
        >>> rows = RowsOncePerSample("embedding")
        >>> rows.update(torch.tensor([4, 1, 4]), embedding=torch.eye(3))
        >>> index, collected = rows.compute()
        >>> index.tolist(), collected["embedding"].shape
        ([1, 4], torch.Size([2, 3]))
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._indices: list[Tensor] = []
        self._rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def update(self, index: Tensor, **rows: Tensor) -> None:
        """Add a batch.

        Args:
            index: which samples, [B].
            rows: for every name a tensor [B, ...], with the same trailing shape and type in every batch and process.
        """
        if set(rows) != set(self.names):
            raise ValueError(f"expected rows for {sorted(self.names)}, got {sorted(rows)}")
        self._indices.append(index.detach())
        for name, row in rows.items():
            self._rows[name].append(row.detach())

    def compute(self, device: torch.device | str | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Positions [N] of the samples, ascending, and for every name their rows [N, ...].

        Args:
            device: where to collect; needed only by a process that may have seen no sample.
        """
        own = {name: (rows[0].shape[1:], rows[0].dtype) for name, rows in self._rows.items() if rows}
        # A process without samples does not know the shapes, but must take part all the same.
        shapes: dict[str, Any] = next((shapes for shapes in gather_objects([own]) if shapes), {})
        if not shapes:
            raise ValueError("there is no sample to evaluate")
        if not self._indices:
            self._indices.append(torch.zeros(0, dtype=torch.int64, device=device))
            for name, (shape, dtype) in shapes.items():
                self._rows[name].append(torch.zeros(0, *shape, dtype=dtype, device=device))
        index = gather_rows(torch.cat(self._indices))
        first = first_occurrences(index)
        return index[first], {name: gather_rows(torch.cat(rows))[first] for name, rows in self._rows.items()}
