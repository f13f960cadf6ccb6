"""Test accuracy measures with hand-made cases, golden numbers and their defining properties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.metrics.classification import hits, label_ranks, mean_clip_probability
from common.metrics.gathering import OncePerSample, RowsOncePerSample, first_occurrences

GOLDEN = Path(__file__).parents[1] / "golden" / "avid_cma" / "probe_and_dense_eval.npz"


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    return 100 * hits(scores, labels, k).mean()


def test_dense_evaluation_equals_the_official_one() -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        scores = mean_clip_probability(torch.from_numpy(golden["dense_clip_logits"]))
        labels = torch.from_numpy(golden["dense_target"])
        np.testing.assert_allclose(scores.numpy(), golden["dense_confidence"], rtol=1e-5, atol=1e-6)
        assert top_k_accuracy(scores, labels, 1).item() == golden["dense_top1"][0]
        assert top_k_accuracy(scores, labels, 3).item() == golden["dense_top3"][0]


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_classifier_without_opinion_is_right_about_nothing(value: float) -> None:
    scores = torch.full((4, 10), value)
    assert top_k_accuracy(scores, torch.arange(4), 1).item() == 0
    assert top_k_accuracy(scores, torch.arange(4), 9).item() == 0


@given(seed=st.integers(0, 1000), samples=st.integers(1, 20), classes=st.integers(1, 8))
def test_top_k_without_ties_agrees_with_sorting(seed: int, samples: int, classes: int) -> None:
    draw = np.random.default_rng(seed)
    scores = torch.from_numpy(draw.permuted(np.tile(np.arange(float(classes)), (samples, 1)), axis=1))
    labels = torch.from_numpy(draw.integers(0, classes, samples))
    order = scores.argsort(1, descending=True)
    for k in range(1, classes + 1):
        expected = (order[:, :k] == labels[:, None]).any(1)
        assert torch.equal(hits(scores, labels, k).bool(), expected)
    assert (label_ranks(scores, labels) < classes).all()


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
    with torch.device("meta"):  # tensors must follow the values' device
        empty = meter.compute("cpu")
    assert (empty["count"].item(), empty["right"].isnan()) == (0, True)
    meter.update(torch.tensor([5, 2, 5, 5, 5]), right=torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    assert meter.compute() == {"right": pytest.approx((1 / 4 + 1) / 2), "count": 2}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 7))
def test_rows_come_once_in_order(indices: list[int], batch: int) -> None:
    rows = RowsOncePerSample("square", "pair")
    for start in range(0, len(indices), batch):
        index = torch.tensor(indices[start : start + batch])
        rows.update(index, square=index**2, pair=torch.stack([index, -index], dim=1).half())
    index, collected = rows.compute()
    assert index.tolist() == sorted(set(indices))
    assert collected["square"].tolist() == [i * i for i in sorted(set(indices))]
    assert torch.equal(collected["pair"], torch.stack([index, -index], dim=1).half())
