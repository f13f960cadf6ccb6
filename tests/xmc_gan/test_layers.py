"""Batch normalization in groups."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from papers.xmc_gan.layers import BatchNorm, keeping_statistics


def test_each_group_is_normalized_by_its_own_statistics_and_the_first_is_remembered() -> None:
    x = 3 * torch.randn(8, 5, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    norm, alone = BatchNorm(5, group=4), BatchNorm(5)
    y = norm(x)
    for place in range(2):
        expected = F.batch_norm(x[place::2], None, None, training=True)
        torch.testing.assert_close(y[place::2], expected)
    alone(x[::2])
    assert norm.running_mean.equal(alone.running_mean)
    assert norm.running_variance.equal(alone.running_variance)
    before = norm.running_mean.clone()
    with keeping_statistics(norm):
        assert norm(x + 1).shape == x.shape
    assert norm.running_mean.equal(before)
    torch.testing.assert_close(norm.eval()(x), F.batch_norm(x, norm.running_mean, norm.running_variance))
