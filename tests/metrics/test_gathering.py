"""Every sample once, within one process; several processes are in tests/distributed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.metrics.gathering import OncePerSample, RowsOncePerSample, first_occurrences


@given(st.lists(st.integers(0, 9), max_size=40))
def test_first_occurrences(values: list[int]) -> None:
    positions = first_occurrences(torch.tensor(values, dtype=torch.int64)).tolist()
    assert positions == [values.index(value) for value in sorted(set(values))]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 7))
def test_mean_counts_each_sample_once(indices: list[int], batch: int) -> None:
    meter = OncePerSample("score", "square")
    for start in range(0, len(indices), batch):
        index = torch.tensor(indices[start : start + batch])
        meter.update(index, score=index.float(), square=index.float() ** 2)
    result = meter.compute()
    samples = sorted(set(indices))
    assert result["count"].item() == len(samples)
    assert result["score"].item() == pytest.approx(sum(samples) / len(samples))
    assert result["square"].item() == pytest.approx(sum(s * s for s in samples) / len(samples))


def test_entries_of_one_sample_are_averaged() -> None:
    meter = OncePerSample("right")
    meter.update(torch.tensor([5, 2, 5, 5, 5]), right=torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    assert meter.compute()["right"].item() == pytest.approx((1 / 4 + 1) / 2)


def test_nothing_seen() -> None:
    empty = OncePerSample("score").compute()
    assert empty["count"].item() == 0
    assert empty["score"].isnan()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 7))
def test_rows_come_once_in_order(indices: list[int], batch: int) -> None:
    rows = RowsOncePerSample("square", "pair")
    for start in range(0, len(indices), batch):
        index = torch.tensor(indices[start : start + batch])
        rows.update(index, square=index**2, pair=torch.stack([index, -index], dim=1).half())
    index, collected = rows.compute()
    assert index.tolist() == sorted(set(indices))
    assert collected["square"].tolist() == [i * i for i in sorted(set(indices))]
    assert collected["pair"].shape == (len(index), 2)
    assert collected["pair"].dtype == torch.float16
