"""Compare towers, momentum average, shuffled keys and queue with training steps of MoCo (see golden/README.md)."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.memory.momentum import update_average
from papers.mct.loss import MultimodalContrast
from papers.mct.networks import Tower, encode_keys
from tests.distributed.harness import run_distributed
from tests.mct.test_loss_golden import close, load


class Encoder(nn.Module):
    """The golden encoder without its head."""

    feature_dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 12)
        self.bn = nn.BatchNorm1d(12)

    def forward(self, rows: Tensor) -> Tensor:
        return self.bn(self.lin(rows)).relu()


class Step(nn.Module):
    """A training step of MoCo, built from MCT's parts."""

    def __init__(self, golden: dict[str, Tensor]) -> None:
        super().__init__()
        tower = Tower(Encoder(), intra_dim=6, inter_dim=None)
        self.tower = nn.ModuleDict({"query": tower, "key": copy.deepcopy(tower).requires_grad_(False)})
        self.objective = MultimodalContrast(
            weight_cc=0.0, weight_cross=0.0, temperature=0.2, queue_size=32, mask_same_image=False, intra_dim=6
        )
        self.double()
        self.load_state_dict(renamed(golden, "init/"), strict=False)
        self.keys: Tensor | None = None

    def forward(self, views: Tensor, permutation: Tensor | None = None) -> Tensor:
        query = self.tower["query"](views[0])["intra"]
        update_average(self.tower["key"].parameters(), self.tower["query"].parameters(), 0.99)
        with patch("papers.mct.networks.order_over_groups", return_value=permutation):
            self.keys = encode_keys(self.tower["key"], views[1])["intra"]
        return self.objective({"ii": query}, {"ii": self.keys})["loss"]

    def enqueue(self) -> None:
        """Enqueue the keys. MoCo enqueues before the backward pass, but compares with a copy of the old queue."""
        assert self.keys is not None
        self.objective.enqueue({"ii": self.keys})


def renamed(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename the golden state to the names of `Step`."""
    state: dict[str, Tensor] = {}
    for name, value in golden.items():
        name = name.removeprefix(prefix) if name.startswith(prefix) else ""
        encoder, _, rest = name.partition(".")
        if encoder in ("encoder_q", "encoder_k"):
            rest = rest.replace("fc.", "heads.intra.projection.") if rest.startswith("fc.") else f"backbone.{rest}"
            state[f"tower.{'query' if encoder == 'encoder_q' else 'key'}.{rest}"] = value
        elif name == "queue":
            state["objective.queues.ii.vectors"] = value.T.contiguous()
        elif name == "queue_ptr":
            state["objective.queues.ii.pointer"] = value[0]
    return state


def optimizer(step: Step) -> torch.optim.Optimizer:
    return torch.optim.SGD(step.tower.query.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)


def check_state(state: dict[str, Any], golden: dict[str, Tensor], prefix: str) -> int:
    expected = renamed(golden, prefix)
    for name, value in expected.items():
        close(state[name], value)
    return len(expected)


def test_six_training_steps_equal_momentum_contrast() -> None:
    golden = load("moco_steps")
    step = Step(golden)
    assert check_state(step.state_dict(), golden, "init/") == 24
    sgd = optimizer(step)
    for views, expected in zip(golden["views"], golden["loss_per_step"]):
        loss = step(views)
        close(loss.detach(), expected)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        step.enqueue()
    assert check_state(step.state_dict(), golden, "final/") == 24


def train_rank(rank: int, golden: dict[str, Tensor]) -> dict[str, Any]:
    step = Step(golden)
    parallel = DistributedDataParallel(step)
    sgd = optimizer(step)
    losses, keys, queues = [], [], []
    for views, permutation in zip(golden[f"rank{rank}/views"], golden["permutation"]):
        loss = parallel(views, permutation)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        step.enqueue()
        losses.append(loss.detach())
        keys.append(step.keys)
        queues.append(step.objective.queues["ii"].vectors.T.clone())
    step.objective.queues["ii"].check_replicas()
    return {"losses": losses, "keys": keys, "queues": queues, "state": step.state_dict()}


def test_two_ranks_with_shuffled_batch_normalization_equal_momentum_contrast() -> None:
    golden = load("moco_two_ranks")
    results = run_distributed(lambda rank: train_rank(rank, golden))
    for rank, result in enumerate(results):
        close(result["losses"], golden[f"rank{rank}/loss_per_step"])
        close(result["keys"], golden[f"rank{rank}/k_unshuffled"])
        close(result["queues"], golden["queue_after_step"])
        assert check_state(result["state"], golden, f"rank{rank}/final/") == (24 if rank == 0 else 10)
    # The golden file has these values only for rank 0, and both ranks must have equal values.
    for name, value in results[0]["state"].items():
        if ".bn." not in name:
            np.testing.assert_array_equal(value, results[1]["state"][name])
