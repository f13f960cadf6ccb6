"""Compare MCT's losses with numbers computed from the formulas (see golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.memory.queue import KeyQueue
from papers.mct.loss import MultimodalContrast, cross_modal_loss, instance_loss, tag_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "mct"


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        return {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}


def close(actual: Any, expected: Any, tolerance: float = 3e-14) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


TEMPERATURES = [("T0p07", 0.07), ("T0p2", 0.2)]
MARGINS = [("alpha0p2", 0.2), ("alpha0p5", 0.5)]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load("mct_losses")


def scores(golden: dict[str, torch.Tensor], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    query = golden["q"] / temperature
    return (query * golden["k"]).sum(1), query @ golden["queue"].T


@pytest.mark.parametrize(("name", "temperature"), TEMPERATURES)
def test_instance_loss(golden: dict[str, torch.Tensor], name: str, temperature: float) -> None:
    positive, negatives = scores(golden, temperature)
    close(instance_loss(positive, negatives), golden[f"nce_per_sample_{name}"])
    close(instance_loss(positive, negatives).mean(), golden[f"nce_{name}"])
    filled = golden["queue_valid"][None]
    close(instance_loss(positive, negatives, filled).mean(), golden[f"nce_valid_only_{name}"])


@pytest.mark.parametrize(("name", "temperature"), TEMPERATURES)
def test_tag_loss(golden: dict[str, torch.Tensor], name: str, temperature: float) -> None:
    positive, negatives = scores(golden, temperature)
    filled = golden["queue_valid"][None]
    queue = KeyQueue(32, 16, tag_count=10, warm="masked")
    queue.tags.copy_(golden["tags_queue"] > 0)
    queue.valid.copy_(golden["queue_valid"])
    related = queue.shared_tags(golden["tags_batch"], float(golden["eps"]))
    assert torch.equal(related, golden["tag_positive_mask"][:, 1:])
    loss = tag_loss(positive, negatives, related, filled)
    close(loss, golden[f"tag_per_sample_{name}"])
    close(loss.mean(), golden[f"tag_{name}"])
    close(1 + related.sum(1), golden["tag_positive_count"])
    again = tag_loss(positive, negatives, related, filled, instance_loss(positive, negatives, filled))
    assert torch.equal(again, loss)


@pytest.mark.parametrize(("name", "margin"), MARGINS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_cross_modal_loss(golden: dict[str, torch.Tensor], name: str, margin: float, reduction: Any) -> None:
    query = golden["q_ic"].clone().requires_grad_()
    positive, negatives = (query * golden["k_ic"]).sum(1), query @ golden["queue_caption"].T
    loss = cross_modal_loss(positive, negatives, "hinge", margin, reduction).mean()
    close(loss.detach(), golden[f"hinge_{reduction}_{name}"])
    if reduction == "sum":
        loss.backward()
        close(query.grad, golden[f"grad_q_ic_hinge_sum_{name}"])
    active = negatives.detach() > (positive.detach() - margin)[:, None]
    assert torch.equal(active.sum(1), golden[f"hinge_active_{name}"].long())
    if reduction != "max":
        filled = golden["queue_valid"][None]
        loss = cross_modal_loss(positive, negatives, "hinge", margin, reduction, filled).mean()
        close(loss.detach(), golden[f"hinge_{reduction}_valid_{name}"])


@pytest.mark.parametrize(("name", "temperature"), TEMPERATURES)
@pytest.mark.parametrize("warm", ["random", "masked"])
def test_the_whole_objective(golden: dict[str, torch.Tensor], name: str, temperature: float, warm: Any) -> None:
    objective = MultimodalContrast(
        weight_ii=1.0, weight_tag=0.5, weight_cc=0.0, weight_cross=3.0, temperature=temperature, queue_size=32,
        queue_warm=warm, mask_same_image=False, intra_dim=16, inter_dim=24, tag_count=10,
    ).double()  # fmt: skip
    for queue, vectors in (("ii", "queue"), ("ic", "queue_caption"), ("ci", "queue_caption")):
        objective.queues[queue].vectors.copy_(golden[vectors])
        objective.queues[queue].valid.copy_(golden["queue_valid"])
    objective.queues["ii"].tags.copy_(golden["tags_queue"] > 0)
    queries = {"ii": golden["q"], "ic": golden["q_ic"], "ci": golden["q_ic"]}
    keys = {"ii": golden["k"], "ic": golden["k_ic"], "ci": golden["k_ic"]}
    out = objective(queries, keys, tags=golden["tags_batch"])
    masked = warm == "masked"
    close(out["ii"], golden[f"nce_valid_only_{name}" if masked else f"nce_{name}"])
    if masked:
        close(out["tag"], golden[f"tag_{name}"])
    close(out["positives"], golden["tag_positive_count"].double().mean(), 1e-6)
    hinge = golden["hinge_mean_valid_alpha0p2" if masked else "hinge_mean_alpha0p2"]
    close(out["ic"], hinge)
    close(out["ci"], hinge)
    if not masked:
        close(out["active_ic"], golden["hinge_active_alpha0p2"].double().mean(), 1e-6)
    close(out["loss"], out["ii"] + 0.5 * out["tag"] + 3 * (out["ic"] + out["ci"]))
    close(out["queue_fill"], golden["queue_valid"].double().mean())


# -- the official code of momentum contrast: one call ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "temperature"), TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_loss_and_gradient_of_momentum_contrast(name: str, temperature: float, dtype: torch.dtype) -> None:
    golden = load("moco_logits")
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    raw = golden["q_raw"].to(dtype).requires_grad_()
    key = F.normalize(golden["k_raw"].to(dtype), dim=1)
    queue = KeyQueue(32, 16).to(dtype)
    queue.vectors.copy_(golden["queue_before"].T)
    positive, negatives = queue.scores(F.normalize(raw, dim=1) / temperature, key)
    per_anchor = instance_loss(positive, negatives)
    per_anchor.mean().backward()
    close(torch.cat([positive[:, None], negatives], dim=1).detach(), golden[f"logits_{name}"], tolerance)
    close(per_anchor.mean().detach(), golden[f"loss_{name}"], tolerance)
    close(per_anchor.detach(), golden[f"loss_per_sample_{name}"], tolerance)
    close(raw.grad, golden[f"grad_q_raw_{name}"], tolerance)


def test_a_queue_that_wraps_equals_momentum_contrast() -> None:
    golden = load("moco_queue")
    objective = MultimodalContrast(
        weight_cc=0.0, weight_cross=0.0, temperature=0.2, queue_size=12, mask_same_image=False, intra_dim=6
    ).double()
    queue = objective.queues["ii"]
    queue.vectors.copy_(golden["queue_init"].T)
    for step in range(5):
        query, key = F.normalize(golden["q_and_k_raw"][step], dim=2)
        close(objective({"ii": query}, {"ii": key})["loss"], golden["loss_per_step"][step])
        objective.enqueue({"ii": key})
        close(queue.vectors.T, golden["queue_after_step"][step])
        assert queue.pointer == golden["ptr_after_step"][step]
