"""Two processes train MCT to the same weights, averages and queues as one process with the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.stages import over, train, train_on_two
from tests.stages import request

BATCH, STEPS = 16, 8


class PooledImages(nn.Module):
    """An encoder without batch statistics: with them, two halves of a batch are not the whole."""

    def __init__(self, feature_dim: int = 6) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.linear = nn.Linear(3 * 16, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.linear(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)))


class MeanOfWords(nn.Module):
    """An encoder without dropout, of which two processes would draw different numbers."""

    def __init__(self, vocabulary_size: int = 256, feature_dim: int = 5) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.vocabulary_size = vocabulary_size
        self.embedding = nn.Embedding(vocabulary_size, feature_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        # Over words and not over the padding, whose length depends on the other captions of a process.
        words = (tokens != 0)[:, :, None]
        return (self.embedding(tokens) * words).sum(1) / words.sum(1)


def _layer(loss: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {
        "trainer": {"max_epochs": 2, "limit_train_batches": STEPS // 2, "log_every_n_steps": 1},
        "model": {
            "init_args": {
                "image_encoder": {"class_path": f"{__name__}.PooledImages", "init_args": {"feature_dim": 6}},
                "text_encoder": {"class_path": f"{__name__}.MeanOfWords", "init_args": {"feature_dim": 5}},
                "text_learning_rate": 0.01,
                "image_learning_rate": 0.01,
                "momentum": 0.7,
                "loss": {"init_args": loss},
                **model,
            }
        },
    }


def _rank_major(size: int) -> Tensor:
    """Where two processes put the row that one puts into each slot, [size].

    Rank r takes rows r, r + 2, ... of a global batch, and the gathered batch holds those of rank 0 first. A batch that
    wraps around the end of the queue is ordered before it is written, so the order is that of the rows' numbers.
    """
    written = torch.arange(STEPS * BATCH)
    row = written % BATCH
    place = written - row + row // 2 + (row % 2) * (BATCH // 2)
    slots = torch.full((size,), -1)
    # Of rows written to the same slot the last stays.
    for number in range(len(written)):
        slots[number % size] = number
    at = torch.full((len(written),), -1)
    at[written] = place
    return at[slots.clamp(min=0)].where(slots >= 0, torch.arange(size))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "model",
    [
        # Four batches to a queue, so a slot holds the same global batch in both runs.
        {"loss": {"queue_size": 64, "queue_warm": "masked"}},
        # More than was written, random entries stay.
        {"loss": {"queue_size": 200, "inter_loss": "infonce"}, "heads": {"shared": True}},
    ],
    ids=lambda model: str(model["loss"]["queue_size"]),
)
def test_two_processes_equal_one(tmp_path: Path, model: dict[str, Any]) -> None:
    one = train(request("mct/mct_tag", tmp_path / "one", layer=over(_layer(**model), 1)))
    ranks = train_on_two(request("mct/mct_tag", tmp_path / "two", layer=over(_layer(**model), 2)))
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
    assert moved  # else the order would be no matter of this test
    assert int(one["state"]["loss.queues.ii.pointer"]) == STEPS * BATCH % size
    # Ranks jump where two similarities are equal but for rounding; that every sample counts once is tested elsewhere.
    assert ranks[0]["metrics"].keys() == one["metrics"].keys()
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert ranks[0]["metrics"]["test/uniformity"] == pytest.approx(
        one["metrics"]["test/uniformity"], rel=1e-3, abs=1e-4
    )
    assert ranks[0]["data"] == one["data"]


@pytest.mark.timeout(300)
def test_two_processes_with_queues_that_a_batch_does_not_divide(tmp_path: Path) -> None:
    """The oldest batch is then cut in the middle, and which of its rows stay depends on the order.

    Two processes lose other samples of that one batch than one process does. Everything newer must be there in both
    runs, and both ranks must agree to the bit, with the shuffled key batch and an encoder with batch statistics too.
    """
    layer = _layer({"queue_size": 24}, key_bn_groups=2)
    del layer["model"]["init_args"]["image_encoder"]
    del layer["model"]["init_args"]["text_encoder"]
    layer["trainer"]["max_epochs"] = 1
    ranks = train_on_two(request("mct/mct_tag", tmp_path / "two", layer=over(layer, 2)))
    one = train(request("mct/mct_tag", tmp_path / "one", layer=over(layer, 1)))
    states = [rank["state"] for rank in ranks]
    for name, value in states[0].items():
        if ".running_" in name:
            continue  # of this rank's half
        other = states[1][name]
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name
    written = STEPS // 2 * BATCH
    newest = torch.arange(written - BATCH, written) % 24
    for name in ("ii", "cc", "ic", "ci"):
        ids = [torch.as_tensor(s[f"loss.queues.{name}.image_id"])[newest] for s in (states[0], one["state"])]
        assert torch.equal(ids[0].sort().values, ids[1].sort().values)
        assert int(states[0][f"loss.queues.{name}.pointer"]) == written % 24


def test_the_order_of_the_queue_by_hand() -> None:
    # One process writes rows 0..15; of two, rank 0 has the even ones.
    place = _rank_major(64)
    assert place[:4].tolist() == [64, 72, 65, 73]  # of the second time round
    assert sorted((place % 64).tolist()) == list(range(64))
    assert _rank_major(200)[128:].tolist() == list(range(128, 200))
