"""Retrieval measures."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.metrics.retrieval import match_ranks, neighbour_precision, recall_at


@given(seed=st.integers(0, 1000), queries=st.integers(1, 30), extra=st.integers(0, 10), block=st.integers(1, 40))
def test_ranks_agree_with_sorting_for_any_block(seed: int, queries: int, extra: int, block: int) -> None:
    draw = np.random.default_rng(seed)
    query = torch.from_numpy(draw.standard_normal((queries, 8)))
    gallery = torch.from_numpy(draw.standard_normal((queries + extra, 8)))
    order = (query @ gallery.T).argsort(1, descending=True)
    expected = (order == torch.arange(queries)[:, None]).int().argmax(1)
    assert torch.equal(match_ranks(query, gallery, block=block), expected)
    for k in (1, 5):
        assert recall_at(query, gallery, k, block=block).item() == pytest.approx(
            100 * (expected < k).double().mean().item()
        )


def test_identity_is_perfect_and_collapse_is_worthless() -> None:
    assert recall_at(torch.eye(6), torch.eye(6), 1).item() == 100
    assert recall_at(torch.ones(6, 3), torch.ones(6, 3), 5).item() == 0
    assert recall_at(torch.full((6, 3), float("nan")), torch.ones(6, 3), 5).item() == 0


def test_targets() -> None:
    query, gallery = torch.eye(4)[[2, 0]], torch.eye(4)
    assert recall_at(query, gallery, 1, target=torch.tensor([2, 0])).item() == 100
    assert recall_at(query, gallery, 1).item() == 0
    with pytest.raises(ValueError, match="target"):
        match_ranks(torch.eye(4), torch.eye(4)[:3])


def test_neighbour_precision() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    neighbours = torch.tensor([[1, 2], [0, 3], [3, 0], [2, 3]], dtype=torch.int32)
    assert neighbour_precision(neighbours, labels).item() == pytest.approx(100 * 5 / 8)
