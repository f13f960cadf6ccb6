"""Memory bank: updates and repeated items."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from common.memory.bank import MemoryBank, last_occurrence


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@given(
    index=st.lists(st.integers(0, 11), min_size=1, max_size=20),
    momentum=st.floats(0, 1),
    seed=st.integers(0, 50),
)
@settings(max_examples=50)
def test_update_is_the_sequential_loop(index: list[int], momentum: float, seed: int) -> None:
    bank, embeddings = MemoryBank(12, 6, momentum), unit(len(index), 6, seed=seed + 1)
    bank.vectors.copy_(unit(12, 6, seed=seed))
    before = bank.vectors.clone()
    expected = before.clone()
    for row, embedding in zip(index, embeddings):
        # Every occurrence blends with the row from before the step; the last one stays.
        expected[row] = F.normalize(momentum * before[row] + (1 - momentum) * embedding, dim=0)
    bank.write(torch.tensor(index), embeddings)
    torch.testing.assert_close(bank.vectors, expected)
    torch.testing.assert_close(bank.vectors.norm(dim=1), torch.ones(12))
    untouched = [row for row in range(12) if row not in index]
    assert torch.equal(bank.vectors[untouched], before[untouched])


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30))
@settings(max_examples=50)
def test_last_occurrence(index: list[int]) -> None:
    expected = [len(index) - 1 - index[::-1].index(item) for item in index]
    assert last_occurrence(torch.tensor(index)).tolist() == expected
