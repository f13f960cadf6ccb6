"""Compare weights, averages and queues of MCT trained by two processes with one process on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.small_mct import STEPS, small_layer
from tests.distributed.stages import over, train, train_on_two
from tests.stages import request

BATCH = 16


def _rank_major(size: int) -> Tensor:
    """Return, for each slot of the single process's queue, the slot that holds the same row with two processes, [size].

    Rank r takes rows r, r + 2, ... of a global batch, and the gathered batch has the rows of rank 0 first. A batch that
    wraps around the end of the queue is sorted by row number before it is written.
    """
    written = torch.arange(STEPS * BATCH)
    row = written % BATCH
    place = written - row + row // 2 + (row % 2) * (BATCH // 2)
    slots = torch.full((size,), -1)
    # If several rows are written to a slot, the last row stays.
    for number in range(len(written)):
        slots[number % size] = number
    at = torch.full((len(written),), -1)
    at[written] = place
    return at[slots.clamp(min=0)].where(slots >= 0, torch.arange(size))


@pytest.mark.parametrize(
    "model",
    [
        # The queue holds exactly four batches, so each slot has the same global batch in both runs.
        {"loss": {"queue_size": 64, "queue_warm": "masked"}},
        # The queue is larger than the number of rows written, so random entries remain.
        {"loss": {"queue_size": 200, "inter_loss": "infonce"}, "heads": {"shared": True}},
    ],
    ids=lambda model: str(model["loss"]["queue_size"]),
)
def test_two_processes_equal_one(tmp_path: Path, model: dict[str, Any]) -> None:
    one = train(request("mct/mct_tag", tmp_path / "one", layer=over(small_layer(**model), 1)))
    ranks = train_on_two(request("mct/mct_tag", tmp_path / "two", layer=over(small_layer(**model), 2)))
    size = model["loss"]["queue_size"]
    place = _rank_major(size) % size
    queues = {name for name in one["state"] if name.endswith((".vectors", ".image_id", ".tags", ".valid"))}
    assert len(queues) == 4 * 3 + 1
    moved = 0
    for name, expected in one["state"].items():
        for rank in ranks:
            found = rank["state"][name]
            if not isinstance(expected, Tensor):
                assert found == expected, name
                continue
            found = torch.as_tensor(found)
            if name in queues:
                moved += not torch.equal(found, expected)
                found = found[place]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert moved  # otherwise, the order was not tested
    assert int(one["state"]["loss.queues.ii.pointer"]) == STEPS * BATCH % size
    # Don't compare retrieval, since rounding can swap the ranks of similar pairs. Another test counts the samples.
    assert ranks[0]["metrics"].keys() == one["metrics"].keys()
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert ranks[0]["metrics"]["test/uniformity"] == pytest.approx(
        one["metrics"]["test/uniformity"], rel=1e-3, abs=1e-4
    )
    assert ranks[0]["data"] == one["data"]


def test_two_processes_with_queues_that_a_batch_does_not_divide(tmp_path: Path) -> None:
    """Check queues that hold only a part of the oldest batch.

    The order of that batch's rows, which depends on the number of processes, decides which rows stay. Both runs must
    hold all newer samples. Both ranks must agree bit for bit, also with shuffled keys and batch statistics.
    """
    layer = small_layer({"queue_size": 24}, batch_norm_group=4)
    del layer["model"]["init_args"]["image_encoder"]
    del layer["model"]["init_args"]["text_encoder"]
    layer["trainer"]["max_epochs"] = 1
    ranks = train_on_two(request("mct/mct_tag", tmp_path / "two", layer=over(layer, 2)))
    one = train(request("mct/mct_tag", tmp_path / "one", layer=over(layer, 1)))
    states = [rank["state"] for rank in ranks]
    for name, value in states[0].items():
        if ".running_" in name:
            continue  # each rank has the statistics of its half
        other = states[1][name]
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name
    written = STEPS // 2 * BATCH
    newest = torch.arange(written - BATCH, written) % 24
    for name in ("ii", "cc", "ic", "ci"):
        ids = [torch.as_tensor(s[f"loss.queues.{name}.image_id"])[newest] for s in (states[0], one["state"])]
        assert torch.equal(ids[0].sort().values, ids[1].sort().values)
        assert int(states[0][f"loss.queues.{name}.pointer"]) == written % 24


def test_a_group_of_batch_normalization_over_two_processes(tmp_path: Path) -> None:
    """Compare weights, averages, keys and running statistics of networks with batch normalization."""
    layer = small_layer({"queue_size": 64, "queue_warm": "masked"}, batch_norm_group=16)
    del layer["model"]["init_args"]["image_encoder"], layer["model"]["init_args"]["text_encoder"]
    layer["trainer"]["precision"] = "64-true"  # batch statistics of few values magnify rounding
    ranks = train_on_two(request("mct/moco_v2", tmp_path / "two", layer=over(layer, 2)))
    one = train(request("mct/moco_v2", tmp_path / "one", layer=over(layer, 1)))
    place, compared = _rank_major(64) % 64, 0
    for name, expected in one["state"].items():
        found = torch.as_tensor(ranks[0]["state"][name])
        if name.endswith((".vectors", ".image_id", ".valid")):
            found = found[place]
        compared += ".running_" in name
        expected = torch.as_tensor(expected)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert compared
