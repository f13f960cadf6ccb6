"""Groups of samples that are compared or normalized together, independent of the number of devices.

A global batch of B samples has G = B / size groups, and sample p is in group p mod G. Rank r of W holds samples r, r +
W, ... (`common.data.samplers`). If W divides G, a rank holds whole groups. If G divides W, a rank holds a part of group
r mod G.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.memory.collective import is_distributed, ranks_apart, world_size


def require_groups(field: str, size: int | None, batch_size: int, devices: int) -> None:
    """Check that groups of `size` divide the global batch on this number of devices. None means the whole batch."""
    if size is None:
        return
    if batch_size % size:
        raise ValueError(
            f"{field} is {size}, which does not divide data.batch_size {batch_size}: give a divisor, or null"
        )
    groups = batch_size // size
    if batch_size % devices or (groups % devices and devices % groups):
        fitting = [n for n in range(1, batch_size + 1) if not batch_size % n and (not groups % n or not n % groups)]
        raise ValueError(
            f"{field} is {size}: the {groups} groups of data.batch_size {batch_size} cannot be shared by {devices} "
            f"devices. Use one of: {', '.join(map(str, fitting))}"
        )


def groups_here(field: str, samples: int, size: int | None) -> int:
    """Count the groups among a rank's samples. If the rank holds a part of a group, return 1."""
    if size is None or samples <= size:
        return 1
    if samples % size:
        raise ValueError(f"{field} is {size}, which does not divide the {samples} samples of a rank")
    return samples // size


def shared_with(samples: int, size: int | None) -> Any:
    """Return the ranks that hold parts of this rank's group, as a process group. None if no other rank does."""
    if not is_distributed():
        return None
    together = world_size() if size is None else min(size // samples, world_size())
    if together <= 1:
        return None
    return dist.group.WORLD if together == world_size() else ranks_apart(world_size() // together)


def split_groups(x: Tensor, groups: int) -> list[Tensor]:
    """Split samples into groups, [B, ...] -> a list of [B / groups, ...]."""
    return [x[group::groups] for group in range(groups)] if groups > 1 else [x]


def join_groups(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts), dim=1).flatten(0, 1)
