"""Two processes train XMC-GAN with the gradients that local, or global, negatives ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.stages import over, train_on_two
from tests.stages import request
from tests.xmc_gan.stub import tiny, tiny_batch

Gradients = dict[str, Tensor]


def _gradients(options: dict[str, Any], rows: slice, joint: bool) -> tuple[Gradients, Tensor, Tensor]:
    """Gradients of one step on some rows of the batch, its loss, and running statistics after it."""
    module = tiny(**options)
    batch, z = tiny_batch(8)
    part = {name: value[rows] for name, value in batch.items()}
    step = module.joint_step if joint else module.discriminator_step
    # Only gradients are looked at: the weights must stay those of the start.
    for optimizer in module.optimizers():  # type: ignore[union-attr]
        optimizer.step = lambda: None  # type: ignore[method-assign]
    loss = step(part, z[rows])
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return found, loss, module.generator.norm.norm.running_variance


def _of_rank(rank: int, options: dict[str, Any], joint: bool) -> tuple[Gradients, Tensor, Tensor]:
    return _gradients(options, slice(rank, None, 2), joint)


def _compare(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (torch.as_tensor(found[name]) - value).abs().max() <= 2e-5 * scale, name


@pytest.mark.parametrize("joint", [True, False])
def test_local_negatives_average_the_gradients_of_the_halves(joint: bool) -> None:
    halves = [_gradients({}, slice(rank, None, 2), joint) for rank in range(2)]
    expected = {name: (halves[0][0][name] + halves[1][0][name]) / 2 for name in halves[0][0]}
    ranks = run_distributed(_of_rank, 2, 60, {}, joint)
    for rank, half in zip(ranks, halves):
        _compare(rank[0], expected)
        torch.testing.assert_close(torch.as_tensor(rank[1]), half[1])
        torch.testing.assert_close(torch.as_tensor(rank[2]), half[2])  # statistics stay those of the device


@pytest.mark.parametrize("joint", [True, False])
def test_global_negatives_equal_one_process_with_the_joint_batch(joint: bool) -> None:
    options = {"negatives": "global", "batch_norm": "sync"}
    expected, loss, variance = _gradients(options, slice(None), joint)
    ranks = run_distributed(_of_rank, 2, 60, options, joint)
    for rank in ranks:
        _compare(rank[0], expected)
        torch.testing.assert_close(torch.as_tensor(rank[2]), variance)
    # The contrastive losses are those of the joint batch on each rank, the hinge that of the rank's own images.
    mean = sum(float(torch.as_tensor(rank[1])) for rank in ranks) / 2
    assert mean == pytest.approx(float(loss), rel=1e-5)


WITHOUT_PARENTS = ["--model.image_network.pretrained", "null", "--model.evaluation.evaluator.pretrained", "null"]
LAYER = {
    "trainer": {"limit_train_batches": 2},
    "model": {"init_args": {"loss": {"init_args": {"negatives": "global"}}}},
    "data": {"init_args": {"test_samples": 11, "test_batch_size": 5}},  # one rank has a whole batch more to match
}


@pytest.mark.timeout(300)
def test_a_stage_of_two_processes_keeps_its_replicas_equal(tmp_path: Path) -> None:
    ranks = train_on_two(request("xmc_gan/xmc_gan", tmp_path, *WITHOUT_PARENTS, layer=over(LAYER, 2)))
    assert ranks[0]["steps"] == ranks[1]["steps"] == 2
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    # Running statistics are those of the device.
    compared = {name for name in ranks[0]["state"] if ".running_" not in name}
    assert len(compared) > 50
    for name in compared:
        assert (ranks[0]["state"][name] == ranks[1]["state"][name]).all(), name
