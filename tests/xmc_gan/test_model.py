"""Compare XMC-GAN's networks with the official code: layers, images, scores, statistics and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.encoders.checkpoint_files import CheckpointError
from common.training.switches import lay_out_channels_last
from papers.xmc_gan.layers import (
    BiasedBatchNorm,
    ConditionalBatchNorm,
    SpectralConv,
    SpectralLinear,
    keeping_statistics,
)
from papers.xmc_gan.loss import contrast, pair_loss, word_similarity
from papers.xmc_gan.networks import Discriminator, DiscriminatorBlock, Generator, ImageNetFeatures, noise_of
from papers.xmc_gan.weights import export, to_official
from tests.encoders.test_official_network import count
from tests.xmc_gan.golden import below, captions, channels_first, from_official, networks, tensor
from tests.xmc_gan.stub import tiny

SPATIAL = ("sn_conv3", "sn_conv1", "cbn", "lcbn", "d_opt_block", "d_block_down", "d_block_same")


def layer_state(name: str, kind: str) -> dict[str, Tensor]:
    """Return the state of a golden layer under our names. `kind` is "" for before training, or "new/" for after."""
    values = {key: torch.from_numpy(value) for key, value in below("layers", f"{name}/").items()}

    def kernel(key: str) -> Tensor:
        array = values[f"params/{key}kernel"]
        return array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T

    if name in ("cbn", "lcbn"):
        part = "Dense" if name == "cbn" else "Conv"
        return {
            "modulation.weight": torch.cat([kernel(f"{part}_{i}/") for i in (0, 1)]),
            "modulation.bias": torch.cat([values[f"params/{part}_{i}/bias"] for i in (0, 1)]),
            "norm.running_mean": values[f"{kind}batch_stats/BatchNorm_0/mean"],
            "norm.running_variance": values[f"{kind}batch_stats/BatchNorm_0/var"],
        }
    if name.startswith("sn_"):
        u = values[f"{kind}spectral_norm_stats/u0"][0]
        return {"weight": kernel(""), "bias": values["params/bias"], "u": u}
    state = {}
    for number, own in enumerate(("conv1", "conv2", "shortcut")):
        official = f"SpectralConv_{number}/"
        if f"params/{official}kernel" in values:
            state |= {
                f"{own}.weight": kernel(official),
                f"{own}.bias": values[f"params/{official}bias"],
                f"{own}.u": values[f"{kind}spectral_norm_stats/{official}u0"][0],
            }
    return state


LAYERS = {
    "sn_dense": lambda: SpectralLinear(6, 7),
    "sn_conv3": lambda: SpectralConv(5, 7, 3),
    "sn_conv1": lambda: SpectralConv(5, 7, 1),
    "cbn": lambda: ConditionalBatchNorm(5, 6, spatial=False),
    "lcbn": lambda: ConditionalBatchNorm(5, 6, spatial=True),
    "d_opt_block": lambda: DiscriminatorBlock(5, 7, first=True),
    "d_block_down": lambda: DiscriminatorBlock(5, 7),
    "d_block_same": lambda: DiscriminatorBlock(5, 5, halve=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_the_official_one(name: str) -> None:
    layer: nn.Module = LAYERS[name]()
    layer.load_state_dict(layer_state(name, ""))
    x, e, es = (tensor("layers", key) for key in ("x", "e", "es"))
    inputs = {"sn_dense": [e], "cbn": [channels_first(x), e], "lcbn": [channels_first(x), channels_first(es)]}
    given = inputs.get(name, [channels_first(x)])

    def expected(mode: str) -> Tensor:
        value = tensor("layers", f"{name}/{mode}")
        return channels_first(value) if name in SPATIAL else value

    torch.testing.assert_close(layer.eval()(*given), expected("out_eval"), rtol=1e-6, atol=4e-6)
    assert all(torch.equal(value, layer_state(name, "")[key]) for key, value in layer.state_dict().items())
    torch.testing.assert_close(layer.train()(*given), expected("out_train"), rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(layer.state_dict(), layer_state(name, "new/"), rtol=1e-6, atol=5e-7)


def check_mean_and_deviation(images: Tensor, key: str) -> None:
    found = torch.stack([images.mean(), images.std(correction=0)])
    torch.testing.assert_close(found, tensor("net128", key), rtol=1e-6, atol=1e-7)


def test_images_and_statistics_of_the_generator() -> None:
    generator, _ = networks()
    given = captions()
    inputs = [given[name] for name in ("z", "words", "sentence", "length")]
    expected = channels_first(tensor("net128", "fake_eval"))
    images = generator.eval()(*inputs)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
    check_mean_and_deviation(images, "fake_eval_mean_std")

    generator.train()
    with keeping_statistics(generator):
        discarded = generator(*inputs)
    untouched = from_official(generator, below("net128", "G/"))
    assert all(torch.equal(value, untouched[name]) for name, value in generator.state_dict().items())
    images = generator(*inputs)
    assert torch.equal(discarded, images)
    check_mean_and_deviation(images, "fake_train_mean_std")  # of all pixels; the array below has one in 16
    torch.testing.assert_close(
        images[:, :, ::4, ::4], channels_first(tensor("net128", "fake_train")), rtol=0, atol=3e-5
    )
    statistics = below("net128", "G_new/")
    after = {name: torch.from_numpy(array) for name, array in to_official(generator.state_dict(), False).items()}
    for name, value in statistics.items():
        torch.testing.assert_close(after[name], torch.from_numpy(value), rtol=1e-6, atol=2e-6)


def test_scores_losses_and_gradients_of_both_networks() -> None:
    generator, discriminator = networks()
    given = captions()
    words, sentence, length, real = (given[name] for name in ("words", "sentence", "length", "image"))
    fake = generator(given["z"], words, sentence, length)
    images = torch.cat([real, fake])
    for mode in ("eval", "train"):  # only training stores the power iteration's result
        seen = discriminator.train(mode == "train")(images, sentence)
        logit = tensor("net128", f"d_logit_{mode}")[:, 0]
        assert (seen.logit - logit).abs().max() <= 4e-6 * logit.abs().max()
        assert seen.regions is not None
        found = {
            "real_sentence": pair_loss(seen.pooled[:3], seen.sentence),
            "fake_sentence": pair_loss(seen.pooled[3:], seen.sentence),
            "real_word": contrast(word_similarity(seen.regions[:3], words, length)),
            "fake_word": contrast(word_similarity(seen.regions[3:], words, length)),
            "image_contrastive": pair_loss(seen.pooled[3:], seen.pooled[:3]),
        }
        for name, value in found.items():
            for part, number in zip(("loss", "acc", "entropy"), value):
                expected = tensor("net128", f"stat_{mode}/{name}_{part}")
                torch.testing.assert_close(number, expected, rtol=5e-6, atol=1e-6, msg=f"{mode} {name} {part}")
    vectors = to_official(discriminator.state_dict(), True)
    for name, value in below("net128", "D_new/").items():
        torch.testing.assert_close(torch.from_numpy(vectors[name]), torch.from_numpy(value), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("side", "of_generator", "of_discriminator", "statistics", "vectors", "without_regions"),
    [
        (128, 78_507_779, 87_911_713, 14_976, 14_305, 87_616_033),
        (256, 92_865_539, 99_415_585, 18_048, 16_609, 98_824_993),
    ],
)
def test_parameters_are_as_many_as_in_the_official_networks(
    side: int, of_generator: int, of_discriminator: int, statistics: int, vectors: int, without_regions: int
) -> None:
    spatial = [4, 2, 1] if side == 128 else [8, 4, 2, 1]
    encoder = [1, 2, 4, 8, 16, 16] if side == 128 else [1, 2, 4, 8, 8, 16, 16]
    with torch.device("meta"):
        generator = Generator(width=96, channels=[16, 16, 8, *spatial])
        discriminator = Discriminator(width=96, channels=encoder)
    assert (generator.image_size, discriminator.image_size) == (side, side)
    assert count(generator) == of_generator
    assert count(discriminator) == of_discriminator
    assert sum(buffer.numel() for buffer in generator.buffers()) == statistics
    assert sum(buffer.numel() for buffer in discriminator.buffers()) == vectors
    discriminator.regions = None
    assert count(discriminator) == without_regions


def naive_generator(generator: Generator, *inputs: Tensor, enlarged: bool = True) -> Tensor:
    """Compute the generator without speed-ups: conditions are channels first and enlarged before use."""
    original = ConditionalBatchNorm.forward

    def forward(self: ConditionalBatchNorm, x: Tensor, condition: Tensor) -> Tensor:
        condition = F.interpolate(condition, x.shape[-2:]) if enlarged and self.spatial else condition
        return original(self, x, condition.contiguous())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConditionalBatchNorm, "forward", forward)
        return generator(*inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("enlarged", [False, True])
def test_the_speed_ups_give_the_same_images_and_gradients(enlarged: bool, channels_last: bool) -> None:
    given = captions()
    inputs = [given[name] for name in ("z", "words", "sentence", "length")]
    results = []
    for run in (lambda g: g(*inputs), lambda g: naive_generator(g, *inputs, enlarged=enlarged)):
        generator, _ = networks()
        if channels_last:
            lay_out_channels_last(generator)
        images = run(generator)
        results.append((images, torch.autograd.grad(images.square().sum(), list(generator.parameters()))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    scale = max(gradient.abs().max() for gradient in results[1][1])
    for fast, naive in zip(results[0][1], results[1][1]):
        assert (fast - naive).abs().max() <= 1e-5 * scale


def test_images_do_not_see_the_padding_and_follow_the_order_of_the_batch() -> None:
    generator = tiny().generator.eval()
    z, words, sentence, length = *(torch.randn(3, *size) for size in ((5,), (4, 6), (6,))), torch.tensor([1, 4, 2])
    images = generator(z, words, sentence, length)
    assert images.shape == (3, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    padded = torch.arange(4)[None] >= length[:, None]
    for filling in (0.0, 7.0):
        torch.testing.assert_close(
            generator(z, words.masked_fill(padded[:, :, None], filling), sentence, length), images, rtol=0, atol=0
        )
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(generator(z[order], words[order], sentence[order], length[order]), images[order])


@pytest.mark.parametrize("network", ["resnet50", "vgg19"])
def test_the_network_of_imagenet_reaches_the_images(network: Any) -> None:
    encoder = ImageNetFeatures(network, size=32).train()
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    found = encoder(images)
    assert found.shape == (2, 1000)
    assert not encoder.network.training
    assert torch.autograd.grad(found.sum(), images)[0].abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_noise_depends_on_seed_and_sample_alone() -> None:
    noise = noise_of(torch.arange(2000), 8, 5)
    assert noise[[7, 3]].equal(noise_of(torch.tensor([7, 3]), 8, 5))
    assert not noise.equal(noise_of(torch.arange(2000), 8, 6))
    assert abs(float(noise.mean())) < 0.03
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    assert noise_of(torch.arange(0), 8, 0).shape == (0, 8)


def test_each_group_is_normalized_by_its_own_statistics_and_the_first_is_remembered() -> None:
    x = 3 * torch.randn(8, 5, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    norm, alone = BiasedBatchNorm(5, group=4), BiasedBatchNorm(5)
    y = norm(x)
    for place in range(2):
        expected = F.batch_norm(x[place::2], None, None, training=True)
        torch.testing.assert_close(y[place::2], expected)
    alone(x[::2])
    assert norm.running_mean.equal(alone.running_mean)
    assert norm.running_variance.equal(alone.running_variance)
    before = norm.running_mean.clone()
    with keeping_statistics(norm):
        assert norm(x + 1).shape == x.shape
    assert norm.running_mean.equal(before)
    torch.testing.assert_close(norm.eval()(x), F.batch_norm(x, norm.running_mean, norm.running_variance))


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    module = tiny(average_momentum=0.5)
    with torch.no_grad():
        module.average.image.bias += 1.0  # so that average and trained weights differ
    torch.save({"state_dict": module.state_dict()}, path)
    return path


def test_the_averaged_generator_is_exported_in_both_layouts(checkpoint: Path, tmp_path: Path) -> None:
    module = tiny()
    own = torch.load(export(checkpoint, tmp_path / "own.pt"), weights_only=True)
    module.generator.load_state_dict(own)
    assert torch.equal(module.generator.image.bias, torch.ones(3))
    with np.load(export(checkpoint, tmp_path / "official.npz", "official")) as arrays:
        assert arrays["params/Conv_1/bias"].tolist() == [1.0, 1.0, 1.0]
        back = from_official(module.generator, arrays)
    assert all(torch.equal(value, own[name]) for name, value in back.items())
    torch.save({"state_dict": {"encoder.weight": torch.zeros(1)}}, checkpoint)
    with pytest.raises(CheckpointError, match="holds no generator"):
        export(checkpoint, tmp_path / "none.pt")
