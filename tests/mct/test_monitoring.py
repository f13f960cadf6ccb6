"""Compare the metrics after pre-training with values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from papers.mct.monitoring import tagged_neighbors, uniformity


def on_a_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_neighbors_by_hand() -> None:
    features = on_a_circle(0, 10, 30, 90, 100) * torch.tensor([1.0, 5.0, 0.1, 3.0, 1.0])[:, None]
    tags = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0], [0, 1]]).bool()
    # The nearest by angle are 0 -> 1, 1 -> 0, 2 -> 1, 4 -> 3. Feature 3 has no tag and is left out.
    assert float(tagged_neighbors(features, tags, 1)) == pytest.approx(100 * 3 / 4)
    # The two nearest are 0 -> 1, 2; 1 -> 0, 2; 2 -> 1, 0; 4 -> 3, 2.
    assert float(tagged_neighbors(features, tags, 2)) == pytest.approx(100 * (1 + 2 + 1 + 1) / 8)
    # An image is not its own neighbor, so each image has at most four neighbors.
    assert float(tagged_neighbors(features, tags, 99)) == pytest.approx(100 * (1 + 3 + 2 + 2) / 16)


def test_neighbors_without_tags_are_nan() -> None:
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert tagged_neighbors(features, torch.zeros(6, 2, dtype=torch.bool)).isnan()
    assert tagged_neighbors(features, torch.zeros(6, 0, dtype=torch.bool)).isnan()
    # A single image has no neighbor.
    assert tagged_neighbors(features[:1], torch.ones(1, 2, dtype=torch.bool)).isnan()


def test_uniformity_by_hand() -> None:
    assert float(uniformity(on_a_circle(0, 0, 0))) == pytest.approx(0, abs=1e-6)
    assert float(uniformity(on_a_circle(0, 90))) == pytest.approx(-4)
    assert float(uniformity(on_a_circle(0, 180))) == pytest.approx(-8)
    # The squared distances are 2, 4 and 2.
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert float(uniformity(on_a_circle(0, 90, 180))) == pytest.approx(expected, rel=1e-5)
    assert float(uniformity(on_a_circle(0, 90).half())) == pytest.approx(-4, rel=1e-2)
    assert uniformity(on_a_circle(0)).isnan()
