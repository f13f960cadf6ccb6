"""MCT in two processes equals one process with the joined batch: queues, averages, gradients, shuffled normalization.

A rank normalizes its queries over its own batch, and its keys over its part of the shuffled batch. One process does the
same arithmetic when it encodes the queries in halves and the keys in two groups of the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.memory.momentum import MomentumPair
from common.training.batch_norm import normalize_in_groups
from papers.mct.loss import MultimodalContrast
from papers.mct.networks import Tower, encode_keys
from tests.distributed.harness import run_distributed

STEPS, BATCH = 4, 8


class Backbone(nn.Module):
    def __init__(self, inputs: int, normalization: nn.Module) -> None:
        super().__init__()
        self.feature_dim = 7
        self.linear = nn.Linear(inputs, 7)
        self.normalization = normalization

    def forward(self, rows: Tensor) -> Tensor:
        return self.normalization(self.linear(rows)).relu()


class Model(nn.Module):
    """The forward part of a training step."""

    def __init__(self, rank: int = 0, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(rank)  # ranks start apart: rank 0's state must reach the others
        self.image = MomentumPair(Tower(Backbone(6, nn.BatchNorm1d(7)), intra_dim=4, inter_dim=5))
        self.text = MomentumPair(Tower(Backbone(3, nn.LayerNorm(7)), intra_dim=4, inter_dim=5))
        fields: dict[str, Any] = {"queue_size": 13, "intra_dim": 4, "inter_dim": 5, "tag_count": 3, "weight_tag": 0.5}
        self.objective = MultimodalContrast(**{**fields, **changes}, seed=rank)
        self.double()
        self.objective.synchronize()

    def forward(self, batch: dict[str, Tensor], permutation: Tensor | None, halves: int) -> dict[str, Tensor]:
        parts = [self.image(part) for part in batch["image_query"].chunk(halves)]
        image = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        text = self.text(batch["text_query"])
        for tower in (self.image, self.text):
            tower.update(0.9)
        if permutation is not None:
            # What two ranks encode, one process has in two groups: place p of the order is in group p mod 2.
            permutation = permutation.view(halves, -1).T.flatten()
        image_key = encode_keys(self.image.key, batch["image_key"], permutation=permutation)
        text_key = encode_keys(self.text.key, batch["text_key"], shuffle=False)
        queries = {"ii": image["intra"], "ic": image["inter"], "cc": text["intra"], "ci": text["inter"]}
        keys = {"ii": image_key["intra"], "ic": text_key["inter"], "cc": text_key["intra"], "ci": image_key["inter"]}
        self.written = keys, batch["image_id"], batch["tags"]
        return self.objective(queries, *self.written)


def joined_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)

    def rows(width: int) -> Tensor:
        return torch.randn(BATCH, width, generator=generator, dtype=torch.double)

    batch = {"image_query": rows(6), "image_key": rows(6), "text_query": rows(3), "text_key": rows(3)}
    batch["tags"] = rows(3) > 0.3
    # From few images on purpose: one occurs twice in a batch and again in the queue.
    batch["image_id"] = torch.randint(9, (BATCH,), generator=generator)
    batch["permutation"] = torch.randperm(BATCH, generator=generator)
    return batch


def train(model: nn.Module, inner: Model, rank: int, world_size: int) -> dict[str, Any]:
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9)
    gradients, losses = [], []
    for step in range(STEPS):
        batch = joined_batch(step)
        permutation = batch.pop("permutation")
        local = {name: rows.chunk(world_size)[rank] for name, rows in batch.items()}
        out = model(local, permutation, 2 // world_size)
        optimizer.zero_grad()
        out["loss"].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained if parameter.grad is not None]))
        optimizer.step()
        inner.objective.enqueue(*inner.written)
        losses.append({name: value.detach() for name, value in out.items()})
    for queue in inner.objective.queues.values():
        queue.check_replicas()
    # Running statistics are those of rank 0's rows, and of both groups in one process.
    state = {name: value for name, value in inner.state_dict().items() if "running" not in name and "num_" not in name}
    return {"gradients": gradients, "losses": losses, "state": state}


def train_rank(rank: int, changes: dict[str, Any]) -> dict[str, Any]:
    model = Model(rank, **changes)
    return train(DistributedDataParallel(model), model, rank, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"queue_warm": "masked"},
        {"inter_loss": "infonce", "mask_same_image": False, "queue_size": 5},
        {"inter_reduction": "max"},
    ],
)
def test_two_processes_equal_one_with_the_joined_batch(changes: dict[str, Any]) -> None:
    model = Model(**changes)
    normalize_in_groups(model.image.key, BATCH // 2, BATCH, 1)
    alone = train(model, model, 0, 1)
    ranks = run_distributed(lambda rank: train_rank(rank, changes))
    for result in ranks:
        assert set(result["state"]) == set(alone["state"])
        for name, value in alone["state"].items():
            np.testing.assert_allclose(result["state"][name], value, rtol=0, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(result["gradients"], torch.stack(alone["gradients"]), rtol=0, atol=1e-12)
    for step, out in enumerate(alone["losses"]):
        for name, value in out.items():
            mean = sum(result["losses"][step][name] for result in ranks) / 2
            np.testing.assert_allclose(mean, value, rtol=0, atol=1e-6 if "_" in name or name == "positives" else 1e-12)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_groups_of_keys_are_the_same_on_two_processes(group: int) -> None:
    """Several groups on each process, one, and one that spans both."""

    def keys(rank: int, world_size: int = 2) -> dict[str, Tensor]:
        pair = Model().image
        normalize_in_groups(pair, group, BATCH, world_size)
        torch.manual_seed(7 + rank)  # the order is rank 0's
        return encode_keys(pair.key, joined_batch(0)["image_key"][rank::world_size])

    alone = keys(0, 1)
    ranks = run_distributed(keys)
    for name, expected in alone.items():
        joined = np.stack([result[name] for result in ranks], axis=1).reshape(expected.shape)
        np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-12)
