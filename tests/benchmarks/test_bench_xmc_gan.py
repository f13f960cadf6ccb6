"""Speed of XMC-GAN's generator: its arrangement of convolutions.

Process CPU time on one thread, with what is compared taken in turns, so that other work on the machine hits both alike.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from papers.xmc_gan.layers import DoublingConv, SpatialConditionalBatchNorm
from papers.xmc_gan.networks import Generator, GeneratorBlock
from tests.benchmarks.speed import compare, in_turns


def _in_the_official_order(patch: pytest.MonkeyPatch) -> None:
    """Enlarge conditions and maps before their convolutions."""
    modulate = SpatialConditionalBatchNorm.forward

    def norm(self: SpatialConditionalBatchNorm, x: Tensor, condition: Tensor) -> Tensor:
        return modulate(self, x, F.interpolate(condition, x.shape[-2:], mode="nearest"))

    def convolution(self: DoublingConv, x: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), self.weight, self.bias, padding=1)

    def block(self: GeneratorBlock, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x, condition))), condition)))
        return h + self.shortcut(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    patch.setattr(SpatialConditionalBatchNorm, "forward", norm)
    patch.setattr(DoublingConv, "forward", convolution)
    patch.setattr(GeneratorBlock, "forward", block)


def test_the_generator_against_the_official_order() -> None:
    """Baseline: the same images at 128 pixels, every change of resolution where the official code has it."""
    torch.manual_seed(0)
    generator = Generator(width=32, channels=[16, 16, 8, 4, 2, 1]).eval()
    inputs = torch.randn(2, 128), torch.randn(2, 17, 768), torch.randn(2, 768), torch.tensor([17, 9])

    @torch.no_grad()
    def ours() -> Tensor:
        return generator(*inputs)  # type: ignore[no-any-return]

    def official() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            _in_the_official_order(patch)
            return ours()

    torch.testing.assert_close(ours(), official(), rtol=0, atol=1e-4)
    seconds = in_turns({"official order": official, "ours": ours}, 5)
    what = "XMC-GAN's generator, 2 images of 128 pixels"
    compare(what, "the official order", seconds["ours"], seconds["official order"]).stays_below(0.7)
