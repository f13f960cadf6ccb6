"""Scores of generated images over two processes, also of odd sizes, are those of one; every sample counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.metrics.generation import (
    FeatureStatistics,
    InceptionScore,
    Moments,
    ObjectAccuracy,
    RPrecision,
    frechet_distance,
    inception_score,
    object_accuracy,
    r_precision,
)
from tests.distributed.harness import run_distributed

COUNT = 37
GENERATOR = torch.Generator().manual_seed(3)
FEATURES = torch.randn(COUNT, 5, generator=GENERATOR)
PROBABILITIES = torch.randn(COUNT, 6, generator=GENERATOR).softmax(1)
TEXT = FEATURES + torch.randn(COUNT, 5, generator=GENERATOR)
NAMED, FOUND = (torch.rand(COUNT, 4, generator=GENERATOR) < 0.5 for _ in range(2))
IDENTITY = torch.arange(COUNT) % 30


def scores(rank: int, own: Tensor) -> dict[str, Any]:
    features, inception = FeatureStatistics(), InceptionScore(3, total=COUNT)
    precision, objects = RPrecision(candidates=10, folds=4), ObjectAccuracy(4)
    for part in own.split(5):
        features.update(part, FEATURES[part])
        inception.update(part, PROBABILITIES[part])
        precision.update(part, FEATURES[part], TEXT[part], IDENTITY[part])
        objects.update(part, NAMED[part], FOUND[part])
    moments = features.compute()
    return {
        "count": moments.count,
        "mean": torch.from_numpy(moments.mean),
        "covariance": torch.from_numpy(moments.covariance),
        "inception": inception.compute(),
        "precision": precision.compute("cpu"),
        "objects": objects.compute("cpu"),
    }


def _rank(rank: int, uneven: bool) -> dict[str, Any]:
    order = torch.arange(COUNT)
    own = (order[:COUNT] if rank == 0 else order[:0]) if uneven else order[rank::2]
    return scores(rank, own)


@pytest.mark.parametrize("uneven", [False, True])
def test_two_processes_equal_one(uneven: bool) -> None:
    expected = Moments.of(FEATURES)
    for found in run_distributed(_rank, 2, 60, uneven):
        assert found["count"] == COUNT
        moments = Moments(COUNT, found["mean"], found["covariance"])
        torch.testing.assert_close(torch.as_tensor(found["mean"]), torch.from_numpy(expected.mean))
        torch.testing.assert_close(torch.as_tensor(found["covariance"]), torch.from_numpy(expected.covariance))
        assert frechet_distance(moments, expected) == pytest.approx(0, abs=1e-6)
        assert found["inception"] == pytest.approx(inception_score(PROBABILITIES, 3), rel=1e-6)
        assert found["precision"] == pytest.approx(r_precision(FEATURES, TEXT, IDENTITY, 10, 4))
        assert found["objects"] == pytest.approx(object_accuracy(NAMED.sum(0), (NAMED & FOUND).sum(0)))


def _same_sample_twice(rank: int) -> str:
    statistics = FeatureStatistics()
    own = torch.tensor([rank, 2, 3 + rank])
    statistics.update(own, FEATURES[own])
    try:
        statistics.compute()
    except ValueError as error:
        return str(error)
    return ""


def test_a_sample_of_two_processes_is_refused() -> None:
    for message in run_distributed(_same_sample_twice):
        assert message.startswith("two processes counted the same 1 samples")
