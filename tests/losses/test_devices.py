"""Losses make what they need on the device of their inputs; checked without an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.losses.margin import in_batch_hinge
from common.losses.matching import in_batch_matching
from common.losses.nce import nce_per_anchor


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
    with FakeTensorMode():  # knows shapes and devices, computes nothing
        assert loss(torch.empty(3, 3, device="cuda")).device.type == "cuda"
