"""R(2+1)D under torchvision's names: parameters, outputs, and the three changes of the public weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

from common.encoders.kinetics import KineticsR2Plus1D
from tests.encoders.test_official_network import count


@pytest.mark.parametrize(("wide_second", "expected"), [(True, 63_697_175), (False, 61_831_661)])
def test_parameters_of_34_layers_with_a_head_of_400(wide_second: bool, expected: int) -> None:
    with torch.device("meta"):
        encoder = KineticsR2Plus1D(wide_second=wide_second)
        assert count(encoder) + count(nn.Linear(encoder.feature_dim, 400)) == expected


def test_middle_widths_of_the_public_weights() -> None:
    with torch.device("meta"):
        encoder = KineticsR2Plus1D()
    for number, middle in ((2, 288), (3, 576), (4, 1152)):
        assert encoder.get_submodule(f"layer{number}.0.conv2.0.0").weight.shape[0] == middle
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm3d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.9)}


def test_equals_torchvision_without_the_changes() -> None:
    theirs = VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [1, 1, 1, 1], R2Plus1dStem, num_classes=5)
    ours = KineticsR2Plus1D((1, 1, 1, 1), wide_second=False, norm_epsilon=1e-5, norm_momentum=0.1)
    state = theirs.state_dict()
    head = {name: state.pop(name) for name in ("fc.weight", "fc.bias")}
    ours.load_state_dict(state)
    video = torch.randn(2, 3, 4, 16, 16)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        scores = nn.functional.linear(ours(video), head["fc.weight"], head["fc.bias"])
        torch.testing.assert_close(scores, theirs(video))
