"""Test the matching losses (UNITER's numbers, N candidates, pairs in a batch), and the devices of all losses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from common.losses.margin import in_batch_hinge
from common.losses.matching import candidate_matching, image_text_matching, in_batch_matching
from common.losses.nce import nce_per_anchor
from tests.m3p.tiny import arrays


def test_two_way_matching_equals_the_released_code() -> None:
    golden = arrays("generic_supervisions")
    logits = F.linear(golden["region_outputs_BxSxC"][:, 0], golden["itm_weight"], golden["itm_bias"])
    labels = golden["itm_labels"]
    np.testing.assert_allclose(image_text_matching(logits, labels), golden["itm_ce_mean"], atol=1e-6)
    one = [float(image_text_matching(a[None], b[None].bool())) for a, b in zip(logits, labels)]
    np.testing.assert_allclose(one, golden["itm_ce_per_pair"], atol=1e-6)


def test_candidates_equal_the_released_code() -> None:
    golden = arrays("pretrain_losses")
    softmax, binary = candidate_matching(golden["relation_logits"].view(2, 4), golden["positive_index"])
    np.testing.assert_allclose(softmax, golden["loss_vlm_ce"], atol=1e-6)
    np.testing.assert_allclose(binary, golden["loss_vlm_bce"], atol=1e-6)


@given(size=st.integers(1, 6), groups=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_pairs_of_a_batch_are_candidates_both_ways(size: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, size, generator=generator, dtype=torch.double)
    group = torch.randint(groups, (size,), generator=generator)
    softmax, binary = in_batch_matching(logits, group)
    one, two, cells = [], [], []
    for row in range(size):
        own = [col for col in range(size) if col == row or group[col] != group[row]]
        one.append(logits[row, own].logsumexp(0) - logits[row, row])
        two.append(logits[own, row].logsumexp(0) - logits[row, row])
        cells += [F.softplus(-logits[row, col] if col == row else logits[row, col]) for col in own]
    torch.testing.assert_close(softmax, (torch.stack(one).mean() + torch.stack(two).mean()) / 2)
    torch.testing.assert_close(binary, torch.stack(cells).mean())
    # If all groups differ, the loss equals the loss without groups, which averages over rows and columns.
    different = in_batch_matching(logits, torch.arange(size))
    torch.testing.assert_close(different, in_batch_matching(logits))
    pairs = torch.arange(size)
    rows, columns = candidate_matching(logits, pairs), candidate_matching(logits.T, pairs)
    torch.testing.assert_close(different, ((rows[0] + columns[0]) / 2, rows[1]))


def test_of_several_numbers_one_that_is_equal_is_enough() -> None:
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    # Samples 0 and 1 share the first number, and samples 1 and 3 share the second.
    sum(in_batch_matching(logits, torch.tensor([[7, 1], [7, 2], [8, 3], [9, 2]]))).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert (logits.grad == 0).nonzero().tolist() == [[0, 1], [1, 0], [1, 3], [3, 1]]


@pytest.mark.parametrize(
    "loss",
    [
        lambda scores: in_batch_hinge(scores, 0.2),
        lambda scores: in_batch_matching(scores)[0],
        lambda scores: in_batch_matching(scores, scores[0].long())[1],
        lambda scores: nce_per_anchor(scores, scores, 2.0).mean(),
    ],
)
def test_tensors_of_two_devices_never_meet(loss: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode():  # tracks shapes and devices only
        assert loss(torch.empty(3, 3, device="cuda")).device.type == "cuda"
