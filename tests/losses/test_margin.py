"""Test the margin losses and masked softmax: VSE++'s numbers, the formulas, and anchors without negatives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.losses.info_nce import info_nce_per_anchor
from common.losses.margin import in_batch_hinge, queue_hinge
from tests.mct.test_loss_golden import close, load


@pytest.mark.parametrize(("name", "margin"), [("margin0p2", 0.2), ("margin0p05", 0.05)])
@pytest.mark.parametrize("kind", ["sum", "max"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_batch_hinge_equals_the_released_code(kind: str, name: str, margin: float, dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    golden = load("vse_loss")
    image, text = (golden[f"{part}_emb"].to(dtype).requires_grad_() for part in ("image", "text"))
    loss = in_batch_hinge(image @ text.T, margin, hardest=kind == "max")
    loss.backward()
    close(loss.item(), golden[f"loss_{kind}_{name}"], tolerance)
    close(image.grad, golden[f"grad_image_{kind}_{name}"], tolerance)
    close(text.grad, golden[f"grad_text_{kind}_{name}"], tolerance)


def test_one_mask_for_all_anchors_may_have_one_dimension() -> None:
    positive, negatives = torch.tensor([0.5, 0.0]), torch.tensor([[0.5, 9.0, 0.75], [1.0, 9.0, 0.0]])
    loss = queue_hinge(positive, negatives, 0.25, "mean", torch.tensor([True, False, True]))
    assert loss.tolist() == [0.375, 0.75]
    of_each = queue_hinge(positive, negatives, 0.25, "mean", torch.tensor([[True], [False]]))
    assert of_each.tolist() == [pytest.approx((0.25 + 8.75 + 0.5) / 3), 0.0]


def test_in_batch_hinge_of_one_pair_is_zero() -> None:
    scores = torch.tensor([[-0.3]], requires_grad=True)
    for hardest in (False, True):
        loss = in_batch_hinge(scores, 0.2, hardest)
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, scores)[0], torch.zeros(1, 1))


@given(
    batch=st.integers(1, 5), size=st.integers(1, 9), margin=st.floats(0, 1), masked=st.booleans(),
    reduction=st.sampled_from(["sum", "mean", "max"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_queue_hinge_is_the_written_formula(
    batch: int, size: int, margin: float, masked: bool, reduction: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    positive, negatives = rng.uniform(-1, 1, batch), rng.uniform(-1, 1, (batch, size))
    mask = rng.random((batch, size)) < (0.5 if masked else 2.0)
    expected = []
    for own, others, counted in zip(positive, negatives, mask):
        hinges = [max(0.0, margin - own + other) for other in others[counted]] or [0.0]
        expected.append({"sum": sum(hinges), "mean": sum(hinges) / len(hinges), "max": max(hinges)}[reduction])
    inputs = torch.from_numpy(positive), torch.from_numpy(negatives)
    loss = queue_hinge(*inputs, margin, reduction, torch.from_numpy(mask) if masked else None)
    np.testing.assert_allclose(loss, expected, rtol=1e-9, atol=1e-12)


NO_NEGATIVE = torch.tensor([[True, False, True], [False, False, False]])


@pytest.mark.parametrize("kind", ["sum", "mean", "max", "info_nce"])
def test_an_anchor_without_negatives_costs_nothing_and_has_no_gradient(kind: Any) -> None:
    positive = torch.tensor([0.1, -0.4], requires_grad=True)
    negatives = torch.tensor([[0.3, 9.0, 0.2], [0.5, 0.9, 0.8]], requires_grad=True)

    def loss_of(others: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if kind == "info_nce":
            return info_nce_per_anchor(positive[:, None], others, mask)
        return queue_hinge(positive, others, 0.2, kind, mask)

    loss = loss_of(negatives, NO_NEGATIVE)
    gradients = torch.autograd.grad(loss.sum(), [positive, negatives])
    assert loss[0] > 0
    assert loss[1] == 0
    assert gradients[0][0] != 0
    assert gradients[0][1] == 0
    hardest = torch.tensor([[True, False, False], [False, False, False]])
    assert torch.equal(gradients[1] != 0, hardest if kind == "max" else NO_NEGATIVE)
    # One row of a mask may serve all anchors, and masked scores may have any value.
    shared = torch.zeros(1, 3, dtype=torch.bool)
    wild = torch.full((2, 3), math.inf)
    assert torch.equal(loss_of(wild, shared), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_half_precision_is_raised_to_float32(dtype: torch.dtype, reduction: Any) -> None:
    # A sum of 65,536 hinges of 0.5 overflows float16, and in bfloat16 the sum would stop growing.
    positive, negatives = torch.full((2,), 0.25, dtype=dtype), torch.full((2, 65536), 0.5, dtype=dtype)
    loss = queue_hinge(positive, negatives, 0.25, reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), 32768.0 if reduction == "sum" else 0.5))
    assert in_batch_hinge(torch.eye(3, dtype=dtype), 1.5).dtype == torch.float32
    mask = torch.arange(65536) < 16384
    loss = info_nce_per_anchor(positive[:, None], negatives, mask)
    torch.testing.assert_close(loss, torch.full((2,), math.log1p(16384 * math.exp(0.25))))


@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=30)
def test_a_mask_is_the_same_as_leaving_the_columns_out(batch: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positives = torch.randn(batch, 2, generator=generator, dtype=torch.double)
    negatives = torch.randn(batch, size, generator=generator, dtype=torch.double)
    kept = torch.rand(size, generator=generator) < 0.5
    kept[0] = True
    loss = info_nce_per_anchor
    torch.testing.assert_close(loss(positives, negatives, kept), loss(positives, negatives[:, kept]))
    everything = torch.ones(1, size, dtype=torch.bool)
    assert torch.equal(loss(positives, negatives, everything), loss(positives, negatives))
