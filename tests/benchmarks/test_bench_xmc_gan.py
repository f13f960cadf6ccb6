"""Speed of XMC-GAN: the generator's arrangement of convolutions, the loss of words, and where a step's time goes.

Process CPU time on one thread, with what is compared taken in turns, so that other work on the machine hits both alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.training.switches import lay_out_channels_last
from papers.xmc_gan.layers import DoublingConv, SpatialConditionalBatchNorm
from papers.xmc_gan.loss import XMCGANLoss, contrast, word_loss
from papers.xmc_gan.module import XMCGANModule
from papers.xmc_gan.networks import Discriminator, Generator, GeneratorBlock, normalize
from tests.benchmarks.speed import compare, in_turns
from tests.xmc_gan.stub import steppable

Step = Callable[[], Any]


def _in_the_official_order(patch: pytest.MonkeyPatch, conditions_only: bool) -> None:
    """Enlarge the conditions before their convolutions and, unless told otherwise, the maps before theirs."""
    modulate = SpatialConditionalBatchNorm.forward

    def norm(self: SpatialConditionalBatchNorm, x: Tensor, condition: Tensor) -> Tensor:
        return modulate(self, x, F.interpolate(condition, x.shape[-2:], mode="nearest"))

    def convolution(self: DoublingConv, x: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), self.weight, self.bias, padding=1)

    def block(self: GeneratorBlock, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x, condition))), condition)))
        return h + self.shortcut(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    patch.setattr(SpatialConditionalBatchNorm, "forward", norm)
    if not conditions_only:
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

    def official(conditions_only: bool) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            _in_the_official_order(patch, conditions_only)
            return ours()

    for conditions_only in (True, False):
        torch.testing.assert_close(ours(), official(conditions_only), rtol=0, atol=1e-4)
    steps: dict[str, Step] = {
        "official order": lambda: official(False),
        "conditions enlarged first": lambda: official(True),
        "ours": ours,
    }
    seconds = in_turns(steps, 5)
    what = "XMC-GAN's generator, 2 images of 128 pixels"
    compare(what, "conditions enlarged first", seconds["ours"], seconds["conditions enlarged first"])
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


def test_where_the_time_of_a_step_goes() -> None:
    """Parts of a joint step at the miniature's size; baseline of the last line: both networks' bare passes."""
    torch.manual_seed(0)
    generator = Generator(width=16, channels=[4, 4, 2, 1], cond_size=8, z_dim=16, embedding_dim=48)
    discriminator = Discriminator(width=16, channels=[1, 2, 4, 4], cond_size=8, embedding_dim=48)
    module = steppable(XMCGANModule(generator, discriminator, XMCGANLoss(weight_image_net=0.0)))
    lay_out_channels_last(module)
    words, length = torch.randn(32, 16, 48).tanh(), torch.randint(13, 17, (32,))
    real, z = torch.rand(32, 3, 32, 32), torch.randn(32, 16)
    batch = {"image": real, "words": words, "sentence": words.mean(1), "length": length}

    def forward() -> Any:
        fake = generator(z, words, batch["sentence"], length)
        return discriminator(torch.cat([real, fake]), batch["sentence"])

    def passes() -> None:
        seen = forward()
        total = seen.logit.sum() + seen.regions.sum()
        torch.autograd.grad(total, list(discriminator.parameters()), retain_graph=True)
        torch.autograd.grad(total, list(generator.parameters()))

    steps: dict[str, Step] = {
        "generator forwards": lambda: generator(z, words, batch["sentence"], length),
        "both forwards": forward,
        "both forwards and backwards": passes,
        "average": lambda: module.generators.update(0.98),
        "whole step": lambda: (module.joint_step(batch, z), module.generators.update(0.98)),
    }
    seconds = in_turns(steps, 10)
    peer = "bare passes of both networks"
    for name in ("generator forwards", "both forwards", "average"):
        compare(f"XMC-GAN, {name}", peer, seconds[name], seconds["both forwards and backwards"])
    what = "XMC-GAN's joint step, 32 images of 32 pixels"
    compare(what, peer, seconds["whole step"], seconds["both forwards and backwards"]).stays_below(1.8)
