"""Groups of a batch: which samples they are, and on how many devices they hold."""

from __future__ import annotations

import pytest
import torch

from common.memory.groups import groups_here, join_groups, require_groups, split_groups


def group_of(size: int, batch_size: int, processes: int) -> dict[int, frozenset[int]]:
    """The group that every sample is in, as the ranks find it."""
    found: dict[int, frozenset[int]] = {}
    own = {rank: torch.arange(batch_size)[rank::processes] for rank in range(processes)}
    for rank, samples in own.items():
        count = groups_here("size", len(samples), size)
        apart = max(1, processes * len(samples) // size) if len(samples) < size else processes
        for place in range(count):
            members = torch.cat([split_groups(own[r], count)[place] for r in range(rank % apart, processes, apart)])
            found |= {int(sample): frozenset(members.tolist()) for sample in split_groups(samples, count)[place]}
    return found


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_a_group_is_the_same_on_any_number_of_devices(processes: int) -> None:
    require_groups("size", 4, 16, processes)
    found = group_of(4, 16, processes)
    assert found == {sample: frozenset(range(sample % 4, 16, 4)) for sample in range(16)}


def test_samples_of_groups_come_back_in_order() -> None:
    x = torch.arange(12.0).view(6, 2)
    assert join_groups(split_groups(x, 3)).equal(x)
    assert join_groups(split_groups(x, 1)).equal(x)
    with pytest.raises(ValueError, match="size is 4"):
        groups_here("size", 6, 4)


@pytest.mark.parametrize(("size", "batch_size", "processes"), [(8, 56, 8), (9, 56, 7), (64, 32, 1)])
def test_devices_that_cannot_hold_the_groups_are_refused(size: int, batch_size: int, processes: int) -> None:
    with pytest.raises(ValueError, match="negatives_group"):
        require_groups("model.loss.negatives_group", size, batch_size, processes)
    require_groups("model.loss.negatives_group", None, batch_size, processes)
