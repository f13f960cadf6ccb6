"""Test the losses of masked words and regions: UNITER's numbers, and batches in which nothing was masked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.losses.masked import (
    masked_language_modeling,
    masked_region_classification,
    masked_region_kl,
    masked_region_regression,
)
from tests.m3p.tiny import arrays


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return arrays("generic_supervisions")


@pytest.fixture
def logits(golden: dict[str, Tensor]) -> Tensor:
    return golden["region_outputs_BxSxC"][golden["masked_BxS"]]


def test_divergence_equals_the_released_code(golden: dict[str, Tensor], logits: Tensor) -> None:
    distribution = golden["detector_distribution_NxC"]
    torch.testing.assert_close(
        masked_region_kl(logits, distribution).double(), golden["mrc_kl_mean"], rtol=0, atol=1e-6
    )
    whole = masked_region_kl(logits, distribution, "batch")
    torch.testing.assert_close(whole.double(), golden["mrc_kl_batchmean"], rtol=0, atol=1e-6)
    one = torch.stack([masked_region_kl(a[None], b[None], "batch") for a, b in zip(logits, distribution)])
    torch.testing.assert_close(one, golden["mrc_kl_elementwise"].sum(1), rtol=0, atol=1e-6)


def test_classes_without_background_equal_the_released_code(golden: dict[str, Tensor], logits: Tensor) -> None:
    classes = golden["detector_distribution_NxC"][:, 1:].argmax(1) + 1
    loss = masked_region_classification(logits, classes)
    torch.testing.assert_close(loss.double(), golden["mrc_ce_mean"], rtol=0, atol=1e-6)
    one = torch.stack([masked_region_classification(a[None], b[None]) for a, b in zip(logits, classes)])
    torch.testing.assert_close(one, golden["mrc_ce_per_region"], rtol=0, atol=1e-6)


def test_regression_equals_the_released_code(golden: dict[str, Tensor], logits: Tensor) -> None:
    loss = masked_region_regression(logits, golden["feature_targets_NxC"])
    torch.testing.assert_close(loss.double(), golden["mrfr_mean"], rtol=0, atol=1e-6)


def test_nothing_masked_costs_nothing_and_has_a_gradient() -> None:
    weight = torch.ones(3, 4, requires_grad=True)
    outputs = torch.zeros(0, 3) @ weight
    losses = (
        masked_language_modeling(outputs, torch.zeros(0, dtype=torch.long)),
        masked_region_classification(outputs, torch.zeros(0, dtype=torch.long)),
        masked_region_kl(outputs, torch.zeros(0, 4)),
        masked_region_kl(outputs, torch.zeros(0, 4), "batch"),
        masked_region_regression(outputs, torch.zeros(0, 4)),
    )
    for loss in losses:
        assert loss == 0
    sum(losses).backward()  # type: ignore[union-attr]
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(3, 4))


def test_half_precision_is_raised() -> None:
    logits = torch.full((2, 3), 60000.0, dtype=torch.half)
    assert masked_language_modeling(logits, torch.tensor([0, 1])).dtype == torch.float32
    assert torch.isfinite(masked_region_regression(logits, torch.zeros(2, 3, dtype=torch.half)))
    assert torch.isfinite(masked_region_kl(logits, torch.full((2, 3), 1 / 3)))
