"""CNN14: parameters, names of the released weights, and the network against a plain spelling of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.encoders.panns import PANNsCNN14
from tests.encoders.test_official_network import count


def test_parameters_with_and_without_the_head_of_527() -> None:
    with torch.device("meta"):
        encoder = PANNsCNN14()
        assert count(encoder) == 79_673_792
        assert count(encoder) + count(nn.Linear(encoder.feature_dim, 527)) == 80_753_615


def plain(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The network in evaluation mode, step by step."""

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
