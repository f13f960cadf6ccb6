"""Memory bank: updates, repeated items, shared storage, and losses against chosen rows."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from common.memory.bank import MemoryBank, RowContrast, interleave, last_occurrence


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def new_bank(num_items: int = 12, dim: int = 6, momentum: float = 0.5, seed: int = 0) -> MemoryBank:
    bank = MemoryBank(num_items, dim, momentum)
    bank.vectors.copy_(unit(num_items, dim, seed=seed))
    return bank


@given(
    index=st.lists(st.integers(0, 11), min_size=1, max_size=20),
    momentum=st.floats(0, 1),
    seed=st.integers(0, 50),
)
@settings(max_examples=50, deadline=None)
def test_update_is_the_sequential_loop(index: list[int], momentum: float, seed: int) -> None:
    bank, embeddings = new_bank(momentum=momentum, seed=seed), unit(len(index), 6, seed=seed + 1)
    before = bank.vectors.clone()
    expected = before.clone()
    for row, embedding in zip(index, embeddings):
        # Every occurrence blends with the row from before the step; the last one stays.
        expected[row] = F.normalize(momentum * before[row] + (1 - momentum) * embedding, dim=0)
    bank.update(torch.tensor(index), embeddings)
    torch.testing.assert_close(bank.vectors, expected)
    torch.testing.assert_close(bank.vectors.norm(dim=1), torch.ones(12))
    untouched = [row for row in range(12) if row not in index]
    assert torch.equal(bank.vectors[untouched], before[untouched])


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_last_occurrence(index: list[int]) -> None:
    expected = [len(index) - 1 - index[::-1].index(item) for item in index]
    assert last_occurrence(torch.tensor(index)).tolist() == expected


def test_initial_rows_are_random_unit_vectors() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(2000, 16)
    torch.testing.assert_close(bank.vectors.norm(dim=1), torch.ones(2000))
    assert bank.vectors.mean(dim=0).abs().max() < 0.03
    assert bank.vectors.dtype == torch.float32


def test_lookup_copies_rows_in_the_shape_of_the_index() -> None:
    bank = new_bank()
    rows = bank.lookup(torch.tensor([[3, 3, 0], [1, 2, 3]]))
    assert rows.shape == (2, 3, 6)
    assert torch.equal(rows[0, 0], bank.vectors[3])
    rows.zero_()
    assert bank.vectors.norm() > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 4), "num_items"), ((4, 0), "dim"), ((4, 4, 1.5), "momentum"), ((4, 4, -0.1), "momentum")],
)
def test_impossible_arguments_are_named(arguments: tuple[float, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MemoryBank(*arguments)  # type: ignore[arg-type]


# -- shared storage ----------------------------------------------------------------------------------------------------


def pair() -> tuple[MemoryBank, MemoryBank]:
    return new_bank(seed=1), new_bank(seed=2)


def test_interleaving_keeps_values_and_shares_memory() -> None:
    video, audio = pair()
    before = video.vectors.clone(), audio.vectors.clone()
    joint = interleave([video, audio])
    assert joint.shape == (12, 2, 6)
    assert torch.equal(video.vectors, before[0])
    assert torch.equal(audio.vectors, before[1])
    video.update(torch.tensor([4]), unit(1, 6, seed=9))
    assert torch.equal(joint[:, 0], video.vectors)
    assert torch.equal(joint[:, 1], audio.vectors)
    again = interleave([video, audio])
    assert again.data_ptr() == joint.data_ptr()


def test_interleaving_heals_after_banks_were_replaced() -> None:
    video, audio = pair()
    interleave([video, audio])
    video.double().float()  # what moving to another device does: a new tensor
    assert torch.equal(interleave([video, audio])[:, 0], video.vectors)
    audio.update(torch.tensor([0]), unit(1, 6))
    assert torch.equal(interleave([video, audio])[:, 1], audio.vectors)


def test_two_banks_in_an_order_that_only_looks_joint_are_laid_out_anew() -> None:
    video, audio = pair()
    interleave([video, audio])
    joint = interleave([audio, video])
    assert torch.equal(joint[:, 0], audio.vectors)
    assert torch.equal(joint[:, 1], video.vectors)


def test_a_first_call_in_inference_mode_does_not_freeze_the_bank() -> None:
    video, audio = pair()
    with torch.inference_mode():
        interleave([video, audio])
    video.update(torch.tensor([0]), unit(1, 6))


def test_saved_banks_hold_every_row_once() -> None:
    video, audio = MemoryBank(500, 16), MemoryBank(500, 16)
    interleave([video, audio])
    buffer = io.BytesIO()
    torch.save({"video": video.state_dict(), "audio": audio.state_dict()}, buffer)
    assert buffer.tell() < 2 * 500 * 16 * 4 * 1.1
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["audio"]["vectors"], audio.vectors)


# -- losses against rows -----------------------------------------------------------------------------------------------


def squares(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    terms = scores.pow(2).mean(dim=(0, 3)).flatten()
    return terms.sum() / 3, terms


@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 20])
def test_row_contrast_equals_plain_autograd_for_every_block_size(block_bytes: int) -> None:
    joint = interleave(pair())
    rows = torch.randint(12, (7, 5), generator=torch.Generator().manual_seed(0))
    embeddings = unit(7, 2, 6, seed=4).requires_grad_()
    reference, reference_terms = squares(torch.einsum("bed,bcvd->bevc", embeddings, joint[rows]))
    (expected,) = torch.autograd.grad(3 * reference, embeddings)

    contrast = RowContrast(block_bytes)
    loss, terms = contrast.loss(embeddings, joint, rows, squares)
    (gradient,) = torch.autograd.grad(3 * loss, embeddings)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(terms, reference_terms)
    torch.testing.assert_close(gradient, expected)
    assert not terms.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(contrast.loss(embeddings, joint, rows, squares)[0], reference)
    scores = torch.einsum("bed,bcvd->bevc", embeddings, joint[rows])
    torch.testing.assert_close(contrast.scores(embeddings, joint, rows), scores.detach())


def test_gradients_outlive_later_steps_and_bank_updates() -> None:
    """Two losses before one backward pass, as in gradient accumulation, with the shared buffer and a changing bank."""
    video, audio = pair()
    joint, contrast = interleave([video, audio]), RowContrast(block_bytes=500)
    rows = torch.randint(12, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    embeddings = unit(4, 2, 6, seed=4).requires_grad_()
    alone = torch.autograd.grad(contrast.loss(embeddings, joint, rows[0], squares)[0], embeddings)[0]
    first, _ = contrast.loss(embeddings, joint, rows[0], squares)
    video.update(torch.arange(12), unit(12, 6, seed=7))
    contrast.loss(embeddings, joint, rows[1], squares)
    assert torch.equal(torch.autograd.grad(first, embeddings)[0], alone)


def test_a_copied_contrast_does_not_carry_its_buffer() -> None:
    contrast = RowContrast(999)
    contrast.scores(unit(1, 1, 6), interleave(pair()), torch.tensor([[0]]))
    assert contrast._buffer is not None
    clone = copy.deepcopy(contrast)
    assert clone._buffer is None
    assert clone.block_bytes == 999
