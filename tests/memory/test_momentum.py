"""A network and its average: parameters are averaged, buffers copied, and no gradient reaches the average."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.memory.momentum import MomentumPair


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@given(momentum=st.floats(0, 1), seed=st.integers(0, 20))
@settings(max_examples=30)
def test_update_is_the_written_formula(momentum: float, seed: int) -> None:
    pair = MomentumPair(network(seed))
    for parameter in pair.query.parameters():
        parameter.data += torch.randn_like(parameter)
    before = [parameter.clone() for parameter in pair.key.parameters()]
    pair.update(momentum)
    for key, old, query in zip(pair.key.parameters(), before, pair.query.parameters()):
        torch.testing.assert_close(key.data, momentum * old + (1 - momentum) * query.data, rtol=1e-5, atol=1e-6)


def test_buffers_are_copied() -> None:
    pair = MomentumPair(network())
    pair.query(torch.randn(8, 4) + 3)
    pair.update(0.5)
    query, key = pair.query[1], pair.key[1]  # type: ignore[index]
    assert torch.equal(key.running_mean, query.running_mean)
    assert int(key.num_batches_tracked) == 1


def test_the_average_starts_as_a_copy_without_gradient_and_trains_along() -> None:
    query = network()
    pair = MomentumPair(query)
    assert pair.query is query
    for key, source in zip(pair.key.parameters(), query.parameters()):
        assert torch.equal(key, source)
        assert key.data_ptr() != source.data_ptr()
        assert not key.requires_grad
    assert pair.key.training
    assert not pair.eval().key.training
    assert pair.train().key.training
    rows = torch.randn(6, 4)
    (query(rows) - pair.key(rows)).pow(2).sum().backward()
    assert all(key.grad is None for key in pair.key.parameters())
    assert all(source.grad is not None for source in query.parameters())
    pair.update(0.9)
    assert not any(key.requires_grad for key in pair.key.parameters())
