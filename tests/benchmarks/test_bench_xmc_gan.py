"""Speed of XMC-GAN: the generator's arrangement of convolutions, and the loss of words.

Process CPU time on one thread, with what is compared taken in turns, so that other work on the machine hits both alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from papers.xmc_gan.layers import DoublingConv, SpatialConditionalBatchNorm
from papers.xmc_gan.loss import contrast, word_loss
from papers.xmc_gan.networks import Generator, GeneratorBlock, normalize
from tests.benchmarks.speed import compare, in_turns

Step = Callable[[], Any]


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


def _one_caption_after_the_other(regions: Tensor, words: Tensor, length: Tensor) -> Tensor:
    """The loss of words with a loop over captions, as its formula reads."""
    regions = normalize(regions)
    rows = []
    for caption, count in zip(words, length.tolist()):
        word = normalize(caption[:count])
        attention = (5.0 * regions @ word.T).softmax(dim=1)
        context = attention.transpose(1, 2) @ regions
        aligned = F.cosine_similarity(context, word[None], dim=-1)
        rows.append(10.0 * (5.0 * aligned).logsumexp(dim=-1))
    return contrast(torch.stack(rows)).loss


def test_the_loss_of_words_against_a_loop_over_captions() -> None:
    """Baseline: one caption after the other against all images, without its padding; forwards and backwards.

    Sizes of the miniature: 32 captions of 16 words, 64 regions. The loop does less arithmetic and more calls.
    """
    torch.manual_seed(0)
    regions = torch.randn(32, 64, 48, requires_grad=True)
    words, length = torch.randn(32, 16, 48), torch.randint(13, 17, (32,))
    torch.testing.assert_close(
        word_loss(regions, words, length).loss, _one_caption_after_the_other(regions, words, length)
    )
    steps: dict[str, Step] = {
        "loop": lambda: torch.autograd.grad(_one_caption_after_the_other(regions, words, length), regions),
        "ours": lambda: torch.autograd.grad(word_loss(regions, words, length).loss, regions),
    }
    seconds = in_turns(steps, 15)
    what = "XMC-GAN's loss of words, 32 captions"
    compare(what, "a loop over captions", seconds["ours"], seconds["loop"]).stays_below(0.8)
