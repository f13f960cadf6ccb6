"""Compare XMC-GAN's gradients in several processes with one process, for all groups of negatives and statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.stages import over, train_on_two
from tests.stages import request
from tests.xmc_gan.stages import WITHOUT_PARENTS
from tests.xmc_gan.stub import tiny, tiny_batch

Gradients = dict[str, Tensor]


def _gradients(options: dict[str, Any], rows: slice, joint: bool) -> tuple[Gradients, Tensor, Tensor]:
    """Run one step on some rows of the batch. Return the gradients, the loss, and the new running statistics."""
    module = tiny(**options)
    batch, z = tiny_batch(8)
    part = {name: value[rows] for name, value in batch.items()}
    step = module.joint_step if joint else module.discriminator_step
    # Only the gradients are compared, so keep the weights.
    for optimizer in module.optimizers():  # type: ignore[union-attr]
        optimizer.step = lambda: None  # type: ignore[method-assign]
    loss = step(part, z[rows])
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return found, loss, module.generator.norm.norm.running_variance


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    ("processes", "group"),
    [
        (2, None),  # a group on both processes
        (2, 4),  # one group per process
        (2, 2),  # two groups per process
        (4, 4),  # two processes per group
    ],
)
def test_groups_equal_those_of_one_process(processes: int, group: int | None, joint: bool) -> None:
    options = {"negatives_group": group, "batch_norm_group": group}
    expected, loss, variance = _gradients(options, slice(None), joint)
    ranks = run_distributed(lambda rank: _gradients(options, slice(rank, None, processes), joint), processes)
    scale = max(value.abs().max() for value in expected.values())
    for found, *_ in ranks:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (torch.as_tensor(found[name]) - value).abs().max() <= 2e-5 * scale, name
    # A checkpoint has the statistics of rank 0, which are the statistics of the first group.
    torch.testing.assert_close(torch.as_tensor(ranks[0][2]), variance)
    # A rank's contrastive losses cover its groups, and its hinge loss covers its images.
    mean = sum(float(torch.as_tensor(rank[1])) for rank in ranks) / processes
    assert mean == pytest.approx(float(loss), rel=1e-5)


def test_groups_differ_from_the_whole_batch() -> None:
    whole, grouped = (_gradients({"negatives_group": g, "batch_norm_group": g}, slice(None), True) for g in (None, 2))
    assert float(whole[1]) != pytest.approx(float(grouped[1]), rel=1e-3)
    assert not torch.allclose(whole[2], grouped[2])


LAYER = {
    "trainer": {"limit_train_batches": 2},
    "model": {"init_args": {"loss": {"init_args": {"negatives_group": 2}}}},
    "data": {"init_args": {"test_samples": 11, "test_batch_size": 5}},  # one rank has one test batch more
}


def test_a_stage_of_two_processes_keeps_its_replicas_equal(tmp_path: Path) -> None:
    ranks = train_on_two(request("xmc_gan/xmc_gan", tmp_path, *WITHOUT_PARENTS, layer=over(LAYER, 2)))
    assert ranks[0]["steps"] == ranks[1]["steps"] == 2
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    # The running statistics are equal too, because rank 0 sends its statistics when training ends.
    assert len(ranks[0]["state"]) > 50
    assert any(".running_" in name for name in ranks[0]["state"])
    for name in ranks[0]["state"]:
        assert (ranks[0]["state"][name] == ranks[1]["state"][name]).all(), name
