"""Test noise-contrastive estimation: the released code's numbers, and scores that would overflow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.losses.info_nce import info_nce_per_anchor
from common.losses.nce import estimate_normalizer, nce_per_anchor
from tests.avid_cma.test_loss_golden import load, tensor


@pytest.mark.parametrize("call", range(5))
def test_nce_equals_the_released_code(call: int) -> None:
    golden = load("nce_core")
    positives, negatives = (tensor(golden[f"{kind}_{call}"]).requires_grad_() for kind in ("pos", "neg"))
    # Calls 0 and 4 estimate the normalizer, calls 1 and 2 reuse the normalizer of call 0, and call 3 has a fixed one.
    source = golden["neg_0"] if call < 3 else golden[f"neg_{call}"]
    normalizer = estimate_normalizer(tensor(source)) if call != 3 else torch.tensor(2.5)
    loss = nce_per_anchor(positives, negatives, normalizer).mean()
    loss.backward()
    for name, found in (
        ("Z", normalizer),
        ("loss", loss.detach()),
        ("grad_pos", positives.grad),
        ("grad_neg", negatives.grad),
    ):
        np.testing.assert_allclose(np.asarray(found), golden[f"{name}_{call}"], rtol=1e-6, atol=2e-7, err_msg=name)


sizes = st.integers(1, 5)


@given(batch=sizes, num_positives=sizes, num_negatives=sizes, seed=st.integers(0, 99))
@settings(max_examples=40)
def test_info_nce_is_the_written_formula(batch: int, num_positives: int, num_negatives: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    positives, negatives = rng.normal(size=(batch, num_positives)) * 3, rng.normal(size=(batch, num_negatives)) * 3
    others = np.exp(negatives).sum(axis=1, keepdims=True)
    expected = -np.log(np.exp(positives) / (np.exp(positives) + others)).mean(axis=1)
    loss = info_nce_per_anchor(torch.from_numpy(positives), torch.from_numpy(negatives))
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_neither_overflow_nor_lose_the_sum(dtype: torch.dtype) -> None:
    # exp(1 / 0.07) is 1.6e6, which overflows float16. A sum of 1,024 equal terms is too long for bfloat16.
    positives = torch.tensor([[1 / 0.07], [-1 / 0.07]], dtype=dtype)
    negatives = torch.full((2, 1024), 1 / 0.07, dtype=dtype)
    normalizer = estimate_normalizer(negatives)
    assert torch.isfinite(normalizer)
    for function, options in ((nce_per_anchor, [normalizer]), (info_nce_per_anchor, [])):
        loss = function(positives, negatives, *options)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, function(positives.float(), negatives.float(), *options))


def test_no_score_makes_the_loss_infinite() -> None:
    extreme = torch.tensor([[1e4, -1e4]]).requires_grad_()
    for loss in (nce_per_anchor(extreme, extreme, 2.2), info_nce_per_anchor(extreme, extreme)):
        (gradient,) = torch.autograd.grad(loss, extreme)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_no_gradient_flows_through_the_normalizer() -> None:
    normalizer = torch.tensor(2.0, requires_grad=True)
    positives = torch.zeros(1, 1, requires_grad=True)
    nce_per_anchor(positives, torch.zeros(1, 3), normalizer).backward()
    assert normalizer.grad is None
    negatives = torch.zeros(1, 3, requires_grad=True)
    assert not estimate_normalizer(negatives).requires_grad


def test_per_anchor_losses_take_leading_dimensions() -> None:
    generator = torch.Generator().manual_seed(2)
    positives, negatives = torch.randn(4, 2, 3, generator=generator), torch.randn(4, 2, 5, generator=generator)
    for direction in range(2):
        own = positives[:, direction], negatives[:, direction]
        torch.testing.assert_close(nce_per_anchor(positives, negatives, 1.5)[:, direction], nce_per_anchor(*own, 1.5))
        torch.testing.assert_close(info_nce_per_anchor(positives, negatives)[:, direction], info_nce_per_anchor(*own))


def test_a_normalizer_that_is_a_number_has_the_precision_of_the_scores() -> None:
    zeros = torch.zeros(2, 1, dtype=torch.double)
    expected = math.log(1.1) + math.log(1 + 1 / 0.1)
    assert math.isclose(nce_per_anchor(zeros, zeros, 0.1)[0].item(), expected, rel_tol=1e-14)
