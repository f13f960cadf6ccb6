"""The order of samples: seeded by epoch, split over ranks, resumable."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.samplers import EpochSampler


@settings(max_examples=60)
@given(
    samples=st.integers(8, 200),
    per_rank=st.integers(1, 4),
    world=st.integers(1, 4),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 50),
)
def test_ranks_share_the_global_batches_of_one_process(
    samples: int, per_rank: int, world: int, seed: int, epoch: int
) -> None:
    batch = per_rank * world
    if samples < batch:
        return
    single = EpochSampler(samples, batch, seed)
    single.set_epoch(epoch)
    order = list(single)
    assert len(order) == len(single) == samples // batch * batch
    assert len({item for _, item in order}) == len(order)
    parts = []
    for rank in range(world):
        sampler = EpochSampler(samples, batch, seed, rank, world)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
    for step in range(samples // batch):
        joined = {key for part in parts for key in part[step * per_rank : (step + 1) * per_rank]}
        assert joined == set(order[step * batch : (step + 1) * batch])


@settings(max_examples=40)
@given(stop=st.integers(0, 9), epoch=st.integers(0, 5), world=st.sampled_from([1, 2]))
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(stop: int, epoch: int, world: int) -> None:
    whole = EpochSampler(43, 4, seed=3, rank=world - 1, world_size=world)
    whole.set_epoch(epoch)
    rest = EpochSampler(43, 4, seed=3, rank=world - 1, world_size=world)
    rest.set_epoch(epoch)
    rest.begin_at(lambda: (epoch, stop))
    assert list(rest) == list(whole)[stop * 4 // world :]
    # Only the first iteration is shortened.
    assert list(rest) == list(whole)


def test_epochs_differ_and_repeat() -> None:
    sampler = EpochSampler(50, 10, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert [item for _, item in second] != [item for _, item in first]
    assert {epoch for epoch, _ in second} == {1}


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by the number of processes"):
        EpochSampler(100, 9, 0, 0, 2)
    with pytest.raises(ValueError, match=r"larger than the 5 samples.*clips_per_video"):
        EpochSampler(5, 8, 0)
