"""Test R(2+1)D under torchvision's names and CNN14: parameters, names of the released weights, and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

from common.encoders.kinetics import KineticsR2Plus1D
from common.encoders.panns import PANNsCNN14
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


def test_parameters_with_and_without_the_head_of_527() -> None:
    with torch.device("meta"):
        encoder = PANNsCNN14()
        assert count(encoder) == 79_673_792
        assert count(encoder) + count(nn.Linear(encoder.feature_dim, 527)) == 80_753_615


def plain(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """Compute the network in evaluation mode, step by step."""

    def norm(x: Tensor, name: str, axis: int) -> Tensor:
        shape = [1] * x.ndim
        shape[axis] = -1
        mean, variance, weight, bias = (
            state[f"{name}.{part}"].view(shape) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    x = norm(x, "bn0", 3)
    for block in range(1, blocks + 1):
        for layer in (1, 2):
            x = F.conv2d(x, state[f"conv_block{block}.conv{layer}.weight"], padding=1)
            x = norm(x, f"conv_block{block}.bn{layer}", 1).clamp(min=0)
        if block < blocks:
            x = F.avg_pool2d(x, 2)
    x = x.mean(dim=3)
    x = x.max(dim=2).values + x.mean(dim=2)
    return (x @ state["fc1.weight"].T + state["fc1.bias"]).clamp(min=0)


def test_equals_the_plain_spelling() -> None:
    encoder = PANNsCNN14((4, 6, 8), mel_bins=16)
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    encoder.eval()
    audio = torch.randn(3, 1, 21, 16)
    with torch.no_grad():
        torch.testing.assert_close(encoder(audio), plain(encoder.state_dict(), audio, 3))
