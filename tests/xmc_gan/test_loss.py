"""Compare XMC-GAN's losses with the official code, and test their properties on any input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.losses.adversarial import hinge_discriminator, hinge_generator
from papers.xmc_gan.loss import Contrast, XMCGANLoss, contrast, pair_loss, word_similarity
from papers.xmc_gan.networks import Captions, DiscriminatorOutput, attend, normalize
from tests.xmc_gan.golden import tensor

CASES = ("a", "b")


def golden(key: str) -> Tensor:
    return tensor("losses", key)


def check(found: Contrast, case: str, name: str, inputs: list[Tensor]) -> None:
    """Compare loss, accuracy, entropy and both gradients with the golden values."""
    torch.testing.assert_close(found.loss, golden(f"{case}/{name}_loss"), rtol=3e-6, atol=5e-7)
    torch.testing.assert_close(found.accuracy, golden(f"{case}/{name}_acc"), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.entropy, golden(f"{case}/{name}_ent"), rtol=3e-6, atol=5e-7)
    for number, gradient in enumerate(torch.autograd.grad(found.loss, inputs)):
        expected = golden(f"{case}/{name}_grad{number}")
        assert (gradient - expected).abs().max() <= 3e-5 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "options"),
    [("con", {}), ("con_t05", {"temperature": 0.5})],
)
def test_pairs_equal_the_official_loss(case: str, name: str, options: dict[str, object]) -> None:
    inputs = [golden(f"{case}/img").requires_grad_(), golden(f"{case}/cond").requires_grad_()]
    check(pair_loss(*inputs, **options), case, name, inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "gammas"), [("word", (5.0, 5.0, 50.0)), ("word_g4_4_10", (4.0, 4.0, 10.0))])
def test_words_equal_the_official_loss(case: str, name: str, gammas: tuple[float, float, float]) -> None:
    inputs = [golden(f"{case}/region").requires_grad_(), golden(f"{case}/word").requires_grad_()]
    length = golden(f"{case}/max_len")[:, 0].long()
    check(contrast(word_similarity(*inputs, length, gammas)), case, name, inputs)  # type: ignore[misc]


@pytest.mark.parametrize("case", CASES)
def test_attention_of_the_generator_is_the_official_one(case: str) -> None:
    region, word, length = golden(f"{case}/region"), golden(f"{case}/word"), golden(f"{case}/max_len")[:, 0].long()
    for key, found in (
        ("g_context", attend(region, word, length, 15.0)),
        ("g_context_nomask", attend(region, word, torch.full_like(length, word.shape[1]), 15.0)),
        ("g_context_gamma1", attend(region, word, length, 1.0)),
    ):
        torch.testing.assert_close(found, golden(f"{case}/{key}"), rtol=0, atol=3e-6)


@pytest.mark.parametrize("case", CASES)
def test_hinge_equals_the_official_losses(case: str) -> None:
    real, fake = golden(f"{case}/real_logit"), golden(f"{case}/fake_logit")
    torch.testing.assert_close(hinge_discriminator(real, fake), golden(f"{case}/hinge_d"), rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(hinge_generator(fake), golden(f"{case}/hinge_g"), rtol=1e-6, atol=2e-7)


def slow_similarity(regions: Tensor, words: Tensor, length: Tensor, gammas: tuple[float, float, float]) -> Tensor:
    """Compute `word_similarity` by its formula, one caption, image and word at a time."""
    rows = []
    for caption, count in zip(words, length.tolist()):
        row = []
        for image in normalize(regions):
            scores = []
            for word in caption[:count]:
                attention = (gammas[0] * image @ normalize(word)).softmax(0)
                scores.append(gammas[1] * torch.cosine_similarity(word, attention @ image, dim=0))
            row.append(gammas[2] / gammas[1] * torch.stack(scores).logsumexp(0))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@given(
    batch=st.integers(2, 5), regions=st.integers(1, 9), width=st.integers(2, 8), longest=st.integers(1, 6),
    seed=st.integers(0, 2**16), padding=st.sampled_from([0.0, 1e6]),
    gammas=st.sampled_from([(5.0, 5.0, 50.0), (2.0, 7.0, 30.0)]),
)  # fmt: skip
@settings(max_examples=40)
def test_words_equal_the_formula_whatever_stands_in_the_padding(
    batch: int, regions: int, width: int, longest: int, seed: int, padding: float, gammas: tuple[float, float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, regions, width, generator=generator)
    words = torch.randn(batch, longest, width, generator=generator)
    length = torch.randint(1, longest + 1, (batch,), generator=generator)
    padded = torch.arange(longest)[None] >= length[:, None]
    expected = slow_similarity(maps, words, length, gammas)
    words = words.masked_fill(padded[:, :, None], padding).requires_grad_()
    found = word_similarity(maps, words, length, gammas)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(found.sum(), words)
    assert torch.isfinite(gradient).all()
    assert (gradient[padded] == 0).all()


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_and_zero_padding_gives_no_nan(precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(4, 16, 8, generator=generator).to(precision).requires_grad_()
    words = torch.randn(4, 6, 8, generator=generator)
    words[:, 3:] = 0
    length = torch.tensor([1, 2, 3, 3])
    with torch.autocast("cpu", dtype=precision):
        found = contrast(word_similarity(maps, words.to(precision), length))
        pairs = pair_loss(maps[:, 0], words[:, 0].to(precision))
        context = attend(maps, words.to(precision), length, 15.0)
    wide = contrast(word_similarity(maps.float(), words.to(precision).float(), length))
    assert found.loss.dtype == pairs.loss.dtype == context.dtype == torch.float32
    torch.testing.assert_close(found.loss, wide.loss)
    (gradient,) = torch.autograd.grad(found.loss + pairs.loss + context.sum(), maps)
    assert torch.isfinite(gradient).all()


# -- the losses of both networks ---------------------------------------------------------------------------------------

WEIGHTS = {"weight_sentence": 0.5, "weight_word": 0.25, "weight_image_d": 2.0, "weight_image_net": 3.0}


def seen(n: int = 4) -> tuple[DiscriminatorOutput, Captions, tuple[Tensor, Tensor]]:
    """Make random outputs of the discriminator and features, for n real and n generated images and their captions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    output = DiscriminatorOutput(normal(2 * n), normal(2 * n, 6), normal(n, 6), normal(2 * n, 9, 5))
    captions = Captions(normal(n, 3, 5), normal(n, 5), torch.tensor([1, 2, 3, 3]))
    return output, captions, (normal(n, 7), normal(n, 7))


def test_every_term_counts_by_its_own_weight() -> None:
    output, captions, features = seen()
    options = {"temperature": 0.3, "word_gammas": [4.0, 6.0, 20.0]}
    loss = XMCGANLoss(**WEIGHTS, **options)  # type: ignore[arg-type]
    (real_logit, fake_logit), (real, fake), (real_maps, fake_maps) = (
        value.chunk(2) for value in (output.logit, output.pooled, output.regions)
    )
    words = (captions.words, captions.length, (4.0, 6.0, 20.0))
    terms = {
        "real_sentence": (0.5, pair_loss(real, output.sentence, 0.3)),
        "real_word": (0.25, contrast(word_similarity(real_maps, *words))),
        "fake_sentence": (0.5, pair_loss(fake, output.sentence, 0.3)),
        "fake_word": (0.25, contrast(word_similarity(fake_maps, *words))),
        "image_d": (2.0, pair_loss(fake, real, 0.3)),
        "image_net": (3.0, pair_loss(*features, 0.3)),
    }
    hinges = {"discriminator": hinge_discriminator(real_logit, fake_logit), "generator": hinge_generator(fake_logit)}
    found = {
        "discriminator": loss.discriminator(output, captions),
        "generator": loss.generator(output, captions, features),
    }
    for network, names in (
        ("discriminator", ["real_sentence", "real_word"]),
        ("generator", ["fake_sentence", "fake_word", "image_d", "image_net"]),
    ):
        expected = {f"{network}_hinge": hinges[network]}
        for name in names:
            expected |= {f"{name}_{part}": value for part, value in terms[name][1]._asdict().items()}
        total = hinges[network] + sum(terms[name][0] * terms[name][1].loss for name in names)
        torch.testing.assert_close(found[network].total, total)
        torch.testing.assert_close(found[network].logs, {f"{network}_loss": total, **expected})


@pytest.mark.parametrize("size", [2, 4])
def test_negatives_are_those_of_the_group(size: int) -> None:
    output, captions, features = seen()
    count = 4 // size
    loss = XMCGANLoss(negatives_group=size)
    whole = XMCGANLoss()
    assert output.regions is not None
    pairs = [whole.pairs(output.pooled[j:4:count], output.sentence[j::count]) for j in range(count)]
    words = [
        whole.words(output.regions[j:4:count], Captions(*(value[j::count] for value in captions))) for j in range(count)
    ]
    for found, expected in (
        (loss.pairs(output.pooled[:4], output.sentence), pairs),
        (loss.words(output.regions[:4], captions), words),
    ):
        for value, values in zip(found, zip(*expected)):
            torch.testing.assert_close(value, torch.stack(values).mean())
    assert loss.pairs(*features).loss.isfinite()
    assert (whole.pairs(*features).loss > loss.pairs(*features).loss) == (size == 2)  # half the negatives
