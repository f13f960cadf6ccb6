"""Two processes train MCT to the same weights, averages and queues as one process with the joined batch."""

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
    """Return, for each slot of one process's queue, the place of its row in the queue of two processes, [size].

    Rank r takes rows r, r + 2, ... of a global batch, and the gathered batch holds those of rank 0 first. A batch that
    wraps around the end of the queue is sorted by row number before it is written.
    """
    written = torch.arange(STEPS * BATCH)
    row = written % BATCH
    place = written - row + row // 2 + (row % 2) * (BATCH // 2)
    slots = torch.full((size,), -1)
    # If several rows are written to a slot, the last one stays.
    for number in range(len(written)):
        slots[number % size] = number
    at = torch.full((len(written),), -1)
    at[written] = place
    return at[slots.clamp(min=0)].where(slots >= 0, torch.arange(size))


@pytest.mark.parametrize(
    "model",
    [
        # Four batches to a queue, so a slot holds the same global batch in both runs.
        {"loss": {"queue_size": 64, "queue_warm": "masked"}},
        # The queue is larger than what is written, so random entries stay.
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
    assert moved  # else this test would not test the order
    assert int(one["state"]["loss.queues.ii.pointer"]) == STEPS * BATCH % size
    # Don't compare retrieval: ranks jump if two similarities are equal up to rounding. Another test counts the samples.
    assert ranks[0]["metrics"].keys() == one["metrics"].keys()
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert ranks[0]["metrics"]["test/uniformity"] == pytest.approx(
        one["metrics"]["test/uniformity"], rel=1e-3, abs=1e-4
    )
    assert ranks[0]["data"] == one["data"]


def test_two_processes_with_queues_that_a_batch_does_not_divide(tmp_path: Path) -> None:
    """The queue cuts the oldest batch, and which of its rows stay depends on their order.

    Two processes keep other samples of that batch than one process does. Both runs must hold all newer samples. Both
    ranks must agree bit for bit, also with the shuffled key batch and an encoder with batch statistics.
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
            continue  # statistics of this rank's half
        other = states[1][name]
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name
    written = STEPS // 2 * BATCH
    newest = torch.arange(written - BATCH, written) % 24
    for name in ("ii", "cc", "ic", "ci"):
        ids = [torch.as_tensor(s[f"loss.queues.{name}.image_id"])[newest] for s in (states[0], one["state"])]
        assert torch.equal(ids[0].sort().values, ids[1].sort().values)
        assert int(states[0][f"loss.queues.{name}.pointer"]) == written % 24


def test_a_group_of_batch_normalization_over_two_processes(tmp_path: Path) -> None:
    """A network with batch normalization: weights, averages, keys and the statistics that evaluation uses."""
    layer = small_layer({"queue_size": 64, "queue_warm": "masked"}, batch_norm_group=16)
    del layer["model"]["init_args"]["image_encoder"], layer["model"]["init_args"]["text_encoder"]
    layer["trainer"]["precision"] = "64-true"  # the last maps have few values, so batch statistics magnify rounding
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
