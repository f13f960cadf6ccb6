"""Test word-region alignment against the numbers of UNITER's and ViLT's code, with padding and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.losses.alignment import cosine_costs, transport_plan, word_region_alignment, word_region_distance
from tests.m3p.tiny import arrays


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return arrays("ipot")


@pytest.fixture
def pairs(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return golden["txt_emb"], golden["img_emb"], ~golden["txt_pad"], ~golden["img_pad"]


@pytest.mark.parametrize(("beta", "iterations"), [(0.5, 1), (0.5, 10), (0.5, 50), (0.5, 100), (0.1, 50), (1.0, 50)])
def test_distances_equal_the_released_code(
    golden: dict[str, Tensor], pairs: tuple[Tensor, ...], beta: float, iterations: int
) -> None:
    found = word_region_distance(*pairs, beta, iterations)  # type: ignore[arg-type]
    torch.testing.assert_close(found, golden[f"dist_beta{beta}_it{iterations}_k1"], rtol=0, atol=1e-6)


def test_costs_and_plan_equal_the_released_code(golden: dict[str, Tensor], pairs: tuple[Tensor, ...]) -> None:
    cost = cosine_costs(*pairs)
    torch.testing.assert_close(cost, golden["cost_it50"], rtol=0, atol=1e-6)
    plan = transport_plan(cost, *pairs[2:])
    torch.testing.assert_close(plan, golden["plan_T_BxNxM_it50"], rtol=0, atol=1e-6)


def test_loss_and_gradients_equal_the_released_code(golden: dict[str, Tensor], pairs: tuple[Tensor, ...]) -> None:
    words, regions = (pair.clone().requires_grad_() for pair in pairs[:2])
    loss = word_region_alignment(words, regions, *pairs[2:], golden["itm_labels"])  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["ot_loss"]), abs=3e-7)
    assert 0.1 * loss.item() == pytest.approx(float(golden["ot_loss_weighted_0p1"]), abs=3e-8)
    torch.testing.assert_close(words.grad, golden["grad_txt"], rtol=0, atol=1e-7)
    torch.testing.assert_close(regions.grad, golden["grad_img"], rtol=0, atol=1e-7)


@given(
    words=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99), beta=st.floats(0.2, 1.0),
)  # fmt: skip
@settings(max_examples=40)
def test_a_padded_batch_equals_pairs_one_by_one(words: list[int], seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = len(words)
    regions = torch.randint(1, 6, (count,), generator=generator).tolist()
    text, image = (torch.randn(count, 5, 4, generator=generator) for _ in range(2))
    masks = [torch.arange(5) < torch.tensor(lengths)[:, None] for lengths in (words, regions)]
    batch = word_region_distance(text, image, *masks, beta, 20)
    plan = transport_plan(cosine_costs(text, image, *masks), *masks, beta, 20)
    for row, (length, found) in enumerate(zip(words, regions)):
        whole = [torch.ones(1, size, dtype=torch.bool) for size in (length, found)]
        alone = word_region_distance(text[row, None, :length], image[row, None, :found], *whole, beta, 20)
        torch.testing.assert_close(batch[row], alone[0], rtol=1e-4, atol=1e-5)
        own = plan[row, :found, :length]
        assert plan[row].sum().item() == pytest.approx(own.sum().item(), abs=1e-6)
        # The columns are scaled last, so they sum to exactly one over the words. The total is one.
        torch.testing.assert_close(own.sum(0), torch.full((length,), 1 / length), rtol=1e-4, atol=1e-5)
        assert own.sum().item() == pytest.approx(1, abs=1e-4)


def test_a_batch_of_one_pair_is_divided_by_one(pairs: tuple[Tensor, ...]) -> None:
    cost = cosine_costs(*pairs)
    expected = (cost.mT * transport_plan(cost, *pairs[2:])).sum((1, 2))
    torch.testing.assert_close(word_region_distance(*pairs), expected)  # type: ignore[arg-type]
    one = [pair[:1] for pair in pairs]
    for sign in (1, -1):
        torch.testing.assert_close(word_region_alignment(*one, torch.tensor([sign > 0])), sign * expected[0])


def test_only_vectors_shorter_than_the_released_bound_count_as_shorter_than_one() -> None:
    lengths = torch.tensor([1e-6, 1e-4, 0.5])
    vectors, axis = lengths[None, :, None] * torch.tensor([1.0, 0.0]), torch.tensor([[[2.0, 0.0]]])
    masks = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    expected = torch.tensor([0.9, 0.0, 0.0])
    torch.testing.assert_close(cosine_costs(vectors, axis, *masks)[0, :, 0], expected)
    torch.testing.assert_close(cosine_costs(axis, vectors, *masks[::-1])[0, 0], expected)


def test_many_steps_between_single_things_do_not_overflow() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert transport_plan(torch.full((1, 1, 1), 0.5), mask, mask, iterations=300).item() == pytest.approx(1)


def test_pairs_with_nothing_to_move() -> None:
    words = torch.randn(3, 4, 8, requires_grad=True)
    regions = torch.randn(3, 5, 8, requires_grad=True)
    text, image = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    text[0], image[1] = False, False
    distance = word_region_distance(words, regions, text, image)
    assert distance[:2].tolist() == [0, 0]
    assert distance[2] > 0
    distance.sum().backward()
    assert words.grad is not None
    assert torch.isfinite(words.grad).all()


def test_it_is_computed_in_float32(pairs: tuple[Tensor, ...]) -> None:
    expected = word_region_distance(*pairs)  # type: ignore[arg-type]
    words, regions, *masks = pairs
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(word_region_distance(words, regions, *masks), expected)
    half = word_region_distance(words.half(), regions.half(), *masks)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-3)
