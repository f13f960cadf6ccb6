"""Test what the golden numbers leave out: negatives, precision, validation, saving, and warm start."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.avid_cma.loss import BankLoss, skip_rows
from tests.avid_cma.test_loss_golden import load, tensor

ITEMS, DIM = 40, 8


def avid(num_items: int = ITEMS, dim: int = DIM, **changes: Any) -> BankLoss:
    return BankLoss(**{"negatives": 16, "seed": 1, **changes}).allocate(num_items, dim)


def cma(mine: bool = True, **changes: Any) -> BankLoss:
    objective = avid(**{"within_negatives": 4, "positives": 5, "positive_within": 1.0, **changes})
    if mine:
        objective.mine()
    return objective


KINDS: dict[str, Callable[..., BankLoss]] = {"avid": avid, "cma": cma}


def batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    video, audio = (torch.randn(6, DIM, generator=generator) for _ in range(2))
    return video.requires_grad_(), audio.requires_grad_(), torch.randperm(ITEMS, generator=generator)[:6]


def run(objective: BankLoss, steps: range, autocast: bool = False) -> list[torch.Tensor]:
    results = []
    for step in steps:
        video, audio, index = batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective(video, audio, index)["loss"]
        results += [loss.detach(), *torch.autograd.grad(loss, [video, audio])]
    return results


def state(objective: BankLoss) -> list[torch.Tensor]:
    banks = objective.video_bank.vectors, objective.audio_bank.vectors
    return [tensor.clone() for tensor in (*banks, objective.normalizer, torch.tensor(objective.step))]


def assert_equal(here: list[torch.Tensor], there: list[torch.Tensor]) -> None:
    assert len(here) == len(there)
    assert all(torch.equal(a, b) for a, b in zip(here, there))


# -- negatives ---------------------------------------------------------------------------------------------------------


def test_negative_mapping_equals_the_released_code() -> None:
    arrays = {key: tensor(value).long() for key, value in load("negative_mapping").items()}
    assert torch.equal(skip_rows(arrays["avid_raw"], arrays["avid_y"][:, None]), arrays["avid_neg"])
    positives = arrays["cma_positive_set"][arrays["cma_y"]]
    assert torch.equal(positives, arrays["cma_pos"])
    assert torch.equal(skip_rows(arrays["cma_raw"], positives), arrays["cma_neg"])


@given(num_items=st.integers(2, 30), data=st.data())
@settings(max_examples=60)
def test_skipping_rows_hits_every_other_row_exactly_once(num_items: int, data: st.DataObject) -> None:
    excluded = sorted(data.draw(st.sets(st.integers(0, num_items - 1), max_size=num_items - 1)))
    raw = torch.arange(num_items - len(excluded))[None]
    mapped = skip_rows(raw, torch.tensor([excluded], dtype=torch.long))
    assert mapped[0].tolist() == [row for row in range(num_items) if row not in excluded]


@pytest.mark.parametrize("quirks", [False, True])
def test_cma_never_draws_a_positive_and_itself_only_with_the_quirk(quirks: bool) -> None:
    objective = cma(official_quirks=quirks, negatives=500)
    index = torch.arange(ITEMS)
    positives = objective.positive_set[index].long()
    negatives = objective.draw_negatives(index, positives, training=True)
    assert negatives.shape == (ITEMS, 500)  # more negatives than items are allowed
    assert not (negatives[:, :, None] == positives[:, None, :]).any()
    assert bool((negatives == index[:, None]).any()) is quirks
    for row in range(ITEMS):
        assert len(negatives[row].unique()) == ITEMS - 5 - (not quirks)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_from_seed_and_step_alone(kind: str) -> None:
    torch.manual_seed(1)
    objective = KINDS[kind]()
    first = run(objective, range(2))
    assert objective.step == 2
    torch.rand(7)  # the loss must not use the global generator
    assert_equal(first, run(KINDS[kind](), range(2)))
    index = torch.arange(6)
    one, other = (
        loss.draw_negatives(index, loss.positive_set[index].long(), training=True)
        for loss in (KINDS[kind](), KINDS[kind](seed=2))
    )
    assert not torch.equal(one, other)


def test_banks_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = state(avid())
    assert torch.equal(torch.rand(4), expected)
    assert_equal(first, state(avid()))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], state(avid(seed=2))[0])


@pytest.mark.parametrize(
    ("step", "training", "seed"),
    [
        (0, True, 32462672406681200), (0, False, 47296446471056564),
        (3, True, 26767543217503309), (3, False, 47296446471056564),
    ],
)  # fmt: skip
def test_the_streams_are_those_of_earlier_versions(step: int, training: bool, seed: int) -> None:
    """Check that a resumed run draws the same negatives as the version that started the run."""
    objective, index = avid(), torch.arange(6)
    objective.step = step
    raw = torch.randint(ITEMS - 1, (6, 16), generator=torch.Generator().manual_seed(seed))
    drawn = objective.draw_negatives(index, objective.positive_set[index].long(), training)
    assert torch.equal(drawn, skip_rows(raw, index[:, None]))


def test_training_draws_anew_in_every_step_and_validation_never() -> None:
    losses = {}
    for update in (True, False):
        for step in (0, 1):
            objective = avid()
            objective.normalizer.fill_(2.0)
            objective.step = step
            losses[update, step] = objective(*batch(), update=update)["loss"].item()
    assert losses[False, 0] == losses[False, 1]
    assert len(set(losses.values())) == 3


# -- terms and banks ---------------------------------------------------------------------------------------------------


def test_terms_within_a_modality_use_the_first_negatives() -> None:
    negatives = torch.randint(ITEMS, (6, 16), generator=torch.Generator().manual_seed(2))
    terms = []
    for within, drawn in ((4, negatives), (None, negatives[:, :4])):
        objective = avid(instance_within=1.0, within_negatives=within)
        objective.normalizer.fill_(2.2)
        terms.append(objective(*batch(), negative_index=drawn)["instance_v2v"])
    assert torch.equal(*terms)


def test_video_and_audio_may_have_their_own_momentum() -> None:
    objective = avid(bank_momentum=(1.0, 0.0))
    before = state(objective)
    video, audio, index = batch()
    objective(video, audio, index)
    torch.testing.assert_close(objective.video_bank.vectors, before[0])
    torch.testing.assert_close(
        objective.audio_bank.vectors[index], torch.nn.functional.normalize(audio, dim=1).detach()
    )


# -- validation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True])
def test_validation_touches_nothing(kind: str, trained: bool) -> None:
    objective, untouched = KINDS[kind](), KINDS[kind]()
    if trained:
        run(objective, range(2))
        run(untouched, range(2))
    before = state(objective)
    with torch.inference_mode():
        first = objective(*batch(7), update=False)["loss"]
        second = objective(*batch(7), update=False)["loss"]
    assert torch.equal(first, second)
    assert_equal(state(objective), before)
    assert_equal(run(objective, range(2, 4)), run(untouched, range(2, 4)))


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_restored_objective_continues_bit_for_bit(kind: str, assign: bool) -> None:
    uninterrupted = KINDS[kind]()
    run(uninterrupted, range(2))
    buffer = io.BytesIO()
    torch.save(uninterrupted.state_dict(), buffer)
    buffer.seek(0)
    restored = KINDS[kind](False) if kind == "cma" else avid()
    restored.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert_equal(state(restored), state(uninterrupted))
    assert_equal(run(restored, range(2, 5)), run(uninterrupted, range(2, 5)))
    assert_equal(state(restored), state(uninterrupted))


def test_state_dict_names_and_holds_each_bank_once() -> None:
    names = {"video_bank.vectors", "audio_bank.vectors", "normalizer", "positive_set", "_extra_state"}
    assert set(avid().state_dict()) == set(cma().state_dict()) == names
    objective = avid(num_items=1000, dim=32)
    buffer = io.BytesIO()
    torch.save(objective.state_dict(), buffer)
    assert buffer.tell() < 2 * 1000 * 32 * 4 * 1.1


# -- warm start --------------------------------------------------------------------------------------------------------


def trained_avid_state(num_items: int = ITEMS) -> dict[str, torch.Tensor]:
    objective = avid(num_items=num_items)
    video, audio, _ = batch()
    objective(video, audio, torch.arange(6))
    return objective.state_dict()


def test_warm_start_takes_banks_and_normalizer_but_not_the_step() -> None:
    source = trained_avid_state()
    objective = cma()
    run(objective, range(1))
    objective.load_banks(source)
    assert torch.equal(objective.video_bank.vectors, source["video_bank.vectors"])
    assert torch.equal(objective.audio_bank.vectors, source["audio_bank.vectors"])
    assert torch.equal(objective.normalizer, source["normalizer"])
    assert objective.step == 0
    assert (objective.positive_set == -1).all()  # load_banks discards positives mined from old banks
    objective.mine()
    run(objective, range(1))
    assert torch.equal(objective.normalizer, source["normalizer"])


def test_warm_start_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"video_bank\.vectors"):
        cma().load_banks(trained_avid_state(30))
    source = trained_avid_state()
    del source["audio_bank.vectors"]
    with pytest.raises(ValueError, match=r"audio_bank\.vectors"):
        cma().load_banks(source)
    objective = cma()
    objective.load_banks(trained_avid_state() | {"normalizer": torch.tensor(0.25)})
    assert objective.normalizer == 0.25
