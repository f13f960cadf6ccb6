"""A network and its average: buffers are copied, and no gradient reaches the average."""

from __future__ import annotations

import torch
from torch import nn

from common.memory.momentum import MomentumPair


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


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
