"""Compare the loss of AVID and CMA in two processes with golden numbers, and with one process on the joined batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.memory.bank import MemoryBank
from common.memory.collective import all_gather_rows
from common.memory.queue import KeyQueue
from common.training.callbacks import CheckReplicas
from papers.avid_cma.loss import BankLoss
from papers.avid_cma.mining import mine_positives
from tests.avid_cma.test_loss_golden import TERMS, close, fill_banks, load, tensor
from tests.distributed.harness import run_distributed


def steps_of(rank: int, name: str, golden: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Run every golden step on this rank's part of the data."""
    if name == "cma":
        objective = BankLoss(negatives=12, within_negatives=5, positives=4, positive_within=1.0).allocate(60, 16)
    else:
        objective = BankLoss(negatives=10).allocate(40, 16)
    fill_banks(objective, golden["bank_v_init"], golden["bank_a_init"])
    # Only rank 0 starts with the golden banks. `synchronize` must send the banks to the other ranks.
    if rank > 0:
        objective.video_bank.vectors.mul_(-1)
        objective.audio_bank.vectors.zero_()
    objective.synchronize()
    if objective.positives:
        objective.mine()
    history = []
    for step in range(2):
        video = tensor(golden["emb_v"][step, rank]).requires_grad_()
        audio = tensor(golden["emb_a"][step, rank]).requires_grad_()
        index = tensor(golden["y"][step, rank])
        out = objective(video, audio, index, negative_index=tensor(golden["neg_idx"][step, rank]))
        out["loss"].backward()
        banks = (objective.video_bank.vectors.clone(), objective.audio_bank.vectors.clone())
        state = {"grad_v": video.grad, "grad_a": audio.grad, "Z": objective.normalizer.clone(), "banks": banks}
        history.append({**out, **state})
    if objective.positives:
        history[-1]["positive_set"] = objective.positive_set
    objective.video_bank.check_replicas()
    objective.audio_bank.check_replicas()
    return history


@pytest.mark.parametrize("name", ["avid_cross", "cma"])
def test_two_processes_equal_the_released_code(name: str) -> None:
    golden = load(f"ddp2_{name}")
    histories = run_distributed(steps_of, 2, name, golden)
    for rank_, history in enumerate(histories):
        for step, out in enumerate(history):
            close(out["loss"], golden["loss"][step, rank_])
            close(out["Z"], golden["Z"][step, rank_])
            close(out["grad_v"], golden["grad_v"][step, rank_])
            close(out["grad_a"], golden["grad_a"][step, rank_])
            close(out["banks"][0], golden["bank_v_after"][step])
            close(out["banks"][1], golden["bank_a_after"][step])
            for key in golden:
                kind, _, pair = key.removeprefix("term_").rpartition("-")
                if key.startswith("term_") and not key.endswith("Modal"):
                    close(out[f"{TERMS[kind]}_{pair}"], golden[key][step, rank_])
    if name == "cma":
        np.testing.assert_array_equal(histories[0][-1]["positive_set"], golden["positive_set"])
    for here, there in zip(*[history[-1]["banks"] for history in histories]):
        np.testing.assert_array_equal(here, there)


def seeded_objective(kind: str) -> BankLoss:
    if kind == "avid":
        objective = BankLoss(negatives=7, instance_within=0.5, seed=5).allocate(30, 8)
    else:
        weights: dict[str, Any] = {"positive_cross": 0.5, "positive_within": 1.0}
        objective = BankLoss(negatives=7, within_negatives=3, positives=4, seed=5, **weights).allocate(30, 8)
        objective.mine()
    objective.normalizer.fill_(2.5)
    return objective


def train(objective: BankLoss, data: tuple[torch.Tensor, ...], part: slice) -> tuple[list[torch.Tensor], Any]:
    """Train on a part of each batch. Return the gradients of every step and the final banks."""
    gradients = []
    for video, audio, index, negatives in zip(*data):
        inputs = [video[part].requires_grad_(), audio[part].requires_grad_()]
        loss = objective(*inputs, index[part], negative_index=negatives[part])["loss"]
        gradients.append(torch.stack(torch.autograd.grad(loss, inputs)))
    return gradients, [objective.video_bank.vectors, objective.audio_bank.vectors]


@pytest.mark.parametrize("kind", ["avid", "cma"])
def test_two_processes_equal_one_with_the_joined_batch(kind: str) -> None:
    # Use three steps of eight samples, and so few items that a batch repeats items on one rank and on both.
    data = *torch.randn(2, 3, 8, 8), torch.randint(4, (3, 8)), torch.randint(30, (3, 8, 7))
    gradients, banks = train(seeded_objective(kind), data, slice(None))
    parts = run_distributed(lambda rank: train(seeded_objective(kind), data, slice(4 * rank, 4 * rank + 4)))
    for part_gradients, part_banks in parts:
        for part_bank, bank in zip(part_banks, banks):
            np.testing.assert_allclose(part_bank, bank, rtol=1e-6, atol=1e-7)
        assert len(part_gradients) == 3
    for step, gradient in enumerate(gradients):
        # Each rank's loss is a mean over its half of the batch, so halve the gradients to get the mean over the whole
        # batch.
        joined = np.concatenate([part[0][step] for part in parts], axis=1) / 2
        np.testing.assert_allclose(joined, gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(parts[0][1][0], parts[1][1][0])


def test_ranks_draw_different_negatives_and_repeat_them_after_a_restart() -> None:
    def draws(rank: int) -> list[torch.Tensor]:
        objective = seeded_objective("avid")
        index = torch.arange(4)
        positives = objective.positive_set[index].long()
        first = objective.draw_negatives(index, positives, training=True)
        again = seeded_objective("avid").draw_negatives(index, positives, training=True)
        objective.step += 1
        return [first, again, objective.draw_negatives(index, positives, training=True)]

    here, there = run_distributed(draws)
    np.testing.assert_array_equal(here[0], here[1])
    assert (here[0] != there[0]).any()
    assert (here[0] != here[2]).any()


def test_mining_by_three_processes_equals_mining_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    video, audio = (torch.nn.functional.normalize(torch.randn(50, 6, generator=generator), dim=1) for _ in range(2))
    alone = mine_positives(video, audio, k=5)
    for mined in run_distributed(lambda _: mine_positives(video, audio, k=5, rows=7), 3):
        np.testing.assert_array_equal(mined, alone)


def test_the_callback_finds_the_copy_that_went_its_own_way_and_names_it() -> None:
    def check(rank: int) -> str:
        torch.manual_seed(0)
        queue = KeyQueue(5, 4)
        module: Any = torch.nn.ModuleDict({"loss": torch.nn.ModuleDict({"bank": MemoryBank(9, 4), "queue": queue})})
        queue.pointer += rank
        trainer: Any = SimpleNamespace(world_size=2, global_step=1000)
        try:
            CheckReplicas().on_train_batch_end(trainer, module, None, None, 0)
        except RuntimeError as error:
            return str(error)
        return ""

    for message in run_distributed(check):
        assert "loss.queue differs between ranks: rank(s) [1]" in message


def test_tensors_of_many_types_travel_together() -> None:
    def rows(rank: int) -> list[torch.Tensor | None]:
        draw = torch.Generator().manual_seed(rank)
        return [
            torch.randn(3, 4, generator=draw)[:, ::2],  # not contiguous
            None,
            torch.randint(2**40, (3,), generator=draw),
            torch.rand(3, 5, generator=draw) > 0.5,
            torch.randn(3, 2, 3, generator=draw).half(),
            torch.randn(3, 1, generator=draw).double(),
        ]

    expected = [None if a is None or b is None else torch.cat([a, b]) for a, b in zip(rows(0), rows(1))]
    for found in run_distributed(lambda rank: all_gather_rows(*rows(rank))):
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(torch.as_tensor(one), other, rtol=0, atol=0)
    assert all_gather_rows(None, expected[0])[0] is None
    assert all_gather_rows(torch.zeros(0, 3), torch.zeros(0).long())[0].shape == (0, 3)


def test_validation_on_different_numbers_of_batches_does_not_wait() -> None:
    def validate(rank: int) -> float:
        torch.manual_seed(rank)
        objective = BankLoss(negatives=7).allocate(30, 8)
        for _ in range(rank + 1):
            objective(torch.randn(2, 8), torch.randn(2, 8), torch.tensor([0, 1]), update=False)
        return objective.normalizer.item()

    assert run_distributed(validate, 2) == [-1.0, -1.0]
