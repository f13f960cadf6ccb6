"""Test the networks that replace released networks in the miniature, and the metrics computed with these networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.data.worlds.emoji_scenes import EmojiScenesWorld
from papers.xmc_gan.miniature import (
    ATTRIBUTE_SIZES,
    AttributeClassifier,
    MiniatureEvaluation,
    PictureNetwork,
    combination,
)
from tests.protocols.test_generation import module

COUNT = 150


EMOJI_SIZES = EmojiScenesWorld.attribute_sizes()


def drawn(count: int = COUNT, seed: int = 0, sizes: Sequence[int] = ATTRIBUTE_SIZES) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.integers(size, size=count) for size in sizes], axis=1))


def painted(attributes: Tensor) -> Tensor:
    """Make pictures whose first pixels encode the attributes, for `Reader` to decode."""
    images = torch.zeros(len(attributes), 3, 8, 8)
    images[:, 0, 0, : attributes.shape[1]] = attributes / 20
    return images


class Reader(AttributeClassifier):
    """Classifier that reads the attributes from `painted`'s pixels and predicts them with high confidence."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        attributes = (images[:, 0, 0, : len(self.sizes)] * 20).round().long()
        parts = self.one_hot(attributes).mul(8).split(self.sizes, dim=1)
        return images[:, :, :2, :5].flatten(1), torch.cat([part.log_softmax(1) for part in parts], dim=1)


def miniature(
    tmp_path: Path, generated: Callable[[Tensor], Tensor], sizes: Sequence[int] = ATTRIBUTE_SIZES
) -> dict[str, float]:
    """Compute the metrics of pictures that `generated` makes from the true attributes."""
    truth, others = drawn(sizes=sizes), drawn(seed=1, sizes=sizes)
    reader = Reader(sizes=sizes)
    torch.save({"state_dict": {f"network.{k}": v for k, v in reader.state_dict().items()}}, tmp_path / "reader.ckpt")
    reader.pretrained = str(tmp_path / "reader.ckpt")
    parts = [{"image": painted(others[part]), "index": part} for part in torch.arange(COUNT).split(40)]
    data = SimpleNamespace(attributes={"test": truth}.__getitem__, reference_loader=lambda: parts)
    evaluation = MiniatureEvaluation(reader)
    evaluation.begin(module(data, COUNT))
    for part in torch.arange(COUNT).split(32):
        part = torch.cat([part, part[:1]])  # repeats a picture
        evaluation.update(painted(generated(truth[part])), {"image": painted(truth[part]), "index": part})
    return evaluation.compute()


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [ATTRIBUTE_SIZES, EMOJI_SIZES])
def test_pictures_that_show_what_was_said(sizes: Sequence[int], tmp_path: Path) -> None:
    found = miniature(tmp_path, lambda attributes: attributes, sizes=sizes)
    perfect = ("mini_r_precision", "mini_soa_i", "mini_soa_c", "mini_background")
    assert [found[name] for name in perfect] == [100] * 4
    assert found["captions"] == COUNT
    assert found["mini_r_precision_shuffled"] < 8
    assert found["mini_soa_i_shuffled"] < 20
    assert found["mini_fd"] == pytest.approx(found["mini_fd_floor"])


def test_pictures_of_the_wrong_sides_colors_and_grounds(tmp_path: Path) -> None:
    def other_ground(attributes: Tensor) -> Tensor:
        return torch.cat([attributes[:, :4], (attributes[:, 4:] + 1) % 3], dim=1)

    found = miniature(tmp_path, other_ground)
    assert (found["mini_background"], found["mini_soa_i"]) == (0, 100)
    assert found["mini_r_precision"] < 100

    def right_color_gone(attributes: Tensor) -> Tensor:
        changed = attributes.clone()
        changed[:, 3] = (changed[:, 3] + 1) % 4
        return changed

    found = miniature(tmp_path, right_color_gone)
    assert (found["mini_background"], found["mini_soa_i"]) == (100, 50)

    def no_circle(attributes: Tensor) -> Tensor:
        changed = attributes.clone()
        changed[:, [0, 2]] = changed[:, [0, 2]].clamp(min=1)
        return changed

    found = miniature(tmp_path, no_circle)
    assert found["mini_soa_c"] == pytest.approx(100 * 2 / 3)
    assert found["mini_fd"] > found["mini_fd_floor"]


def test_a_thing_of_one_attribute_is_right_or_wrong_as_a_whole(tmp_path: Path) -> None:
    def no_star_on_the_right(attributes: Tensor) -> Tensor:
        changed = attributes.clone()
        changed[:, 1] = changed[:, 1].where(changed[:, 1] != 1, 0)
        return changed

    found = miniature(tmp_path, no_star_on_the_right, sizes=EMOJI_SIZES)
    truth = drawn(sizes=EMOJI_SIZES)
    stars = (truth[:, :2] == 1).sum(0)
    assert found["mini_soa_i"] == pytest.approx(100 - 100 * int(stars[1]) / (2 * COUNT))
    assert found["mini_soa_c"] == pytest.approx(100 * (11 + int(stars[0]) / int(stars.sum())) / 12)
    assert found["mini_background"] == 100


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [ATTRIBUTE_SIZES, EMOJI_SIZES])
def test_combinations_have_numbers_of_their_own(sizes: Sequence[int]) -> None:
    every = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    network = AttributeClassifier(sizes=sizes)
    assert sorted(combination(every, sizes).tolist()) == list(range(432))
    assert network.one_hot(every).sum(1).eq(len(sizes)).all()
    assert network.named(network.one_hot(every)).equal(every)


def test_the_loss_of_the_evaluator_is_the_sum_over_attributes() -> None:
    network, images, attributes = AttributeClassifier(4, 8).eval(), torch.rand(6, 3, 32, 32), drawn(6)
    loss, right = network.loss_and_accuracy(images, attributes)
    scores = network.head(network.features(images)).split(list(ATTRIBUTE_SIZES), dim=1)
    expected = sum(nn.functional.cross_entropy(s, a, reduction="none") for s, a in zip(scores, attributes.T))
    torch.testing.assert_close(loss, expected)
    named = torch.stack([part.argmax(1) for part in scores], dim=1)
    assert right.tolist() == (named == attributes)[:, :4].all(1).float().tolist()


def test_the_image_network_learns_the_thing_in_each_half() -> None:
    attributes, images = torch.tensor([[0, 1, 2, 3, 2], [1, 0, 1, 0, 1]]), torch.rand(2, 3, 32, 32)
    crops = PictureNetwork("crops").eval()
    assert crops(images).shape == (2, 12)
    halves = crops(images[..., :16]), crops(images[..., 16:])
    loss, _ = crops.loss_and_accuracy(images, attributes)
    expected = [
        nn.functional.cross_entropy(half, attributes[:, 2 * side] * 4 + attributes[:, 2 * side + 1], reduction="none")
        for side, half in enumerate(halves)
    ]
    torch.testing.assert_close(loss, expected[0] + expected[1])

    # These are the same objects, but each object is one class instead of several attributes.
    whole = PictureNetwork("crops", sizes=EMOJI_SIZES).eval()
    whole.load_state_dict(crops.state_dict())
    things = torch.stack([attributes[:, 0] * 4 + attributes[:, 1], attributes[:, 2] * 4 + attributes[:, 3]], dim=1)
    found = whole.loss_and_accuracy(images, torch.cat([things, attributes[:, 4:]], dim=1))[0]
    torch.testing.assert_close(found, loss)
