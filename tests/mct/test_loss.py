"""Test MCT's losses and queues: combinations, masks, tags, first steps, precision, restoring, impossible input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from common.memory.queue import KeyQueue
from papers.mct.loss import MultimodalContrast, cross_modal_loss, instance_loss, tag_loss

WIDTHS = {"ii": 6, "cc": 6, "ic": 10, "ci": 10}


def embeddings(batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: F.normalize(torch.randn(batch, dim, generator=generator), dim=1) for name, dim in WIDTHS.items()}


def objective(**changes: Any) -> MultimodalContrast:
    fields: dict[str, Any] = {"queue_size": 12, "intra_dim": 6, "inter_dim": 10, "temperature": 0.2}
    return MultimodalContrast(**{**fields, **changes})


def full(**changes: Any) -> MultimodalContrast:
    return objective(**{"weight_tag": 1.0, "tag_count": 4, **changes})


def tags_of(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 4, generator=torch.Generator().manual_seed(seed)) < 0.4


# -- what each loss means ----------------------------------------------------------------------------------------------


def test_without_tags_the_tag_loss_is_the_instance_loss_to_the_last_bit() -> None:
    contrast = full()
    for step in range(6):
        queries, keys = embeddings(3, step), embeddings(3, step + 50)
        ids = torch.arange(3) + 3 * step
        out = contrast(queries, keys, ids, torch.zeros(3, 4))
        assert torch.equal(out["tag"], out["ii"])
        assert out["positives"] == 1
        contrast.enqueue(keys, ids, tags_of(3, step))
    # The image's own key is a positive even if epsilon exceeds all similarities of tags.
    out = full(epsilon=4.0)(queries, keys, ids, torch.ones(3, 4))
    assert torch.equal(out["tag"], out["ii"])


@given(batch=st.integers(1, 4), size=st.integers(1, 10), masked=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_tag_loss_is_the_written_formula(batch: int, size: int, masked: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positive = 3 * torch.randn(batch, generator=generator, dtype=torch.double)
    negatives = 3 * torch.randn(batch, size, generator=generator, dtype=torch.double)
    related = torch.rand(batch, size, generator=generator) < 0.5
    mask = torch.rand(batch, size, generator=generator) < (0.6 if masked else 2.0)
    expected = []
    for anchor in range(batch):
        counted = [float(positive[anchor]), *negatives[anchor][mask[anchor]].tolist()]
        chosen = [float(positive[anchor]), *negatives[anchor][mask[anchor] & related[anchor]].tolist()]
        log_sum = math.log(sum(map(math.exp, counted)))
        expected.append(-sum(score - log_sum for score in chosen) / len(chosen))
    loss = tag_loss(positive, negatives, related, mask if masked else None)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.double))


def test_a_slot_that_does_not_count_may_hold_anything() -> None:
    positive, negatives = torch.randn(2, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3)
    related, mask = torch.tensor([[True, True, False]] * 2), torch.tensor([[True, False, True]] * 2)
    expected = tag_loss(positive, negatives, related, mask)
    for value in (torch.nan, torch.inf, 7.0):
        odd = negatives.masked_fill(~mask, value).requires_grad_()
        loss = tag_loss(positive, odd, related, mask)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        loss.sum().backward()
        assert odd.grad is not None
        assert odd.grad.isfinite().all()
        assert not odd.grad[~mask].any()


def test_keys_of_the_own_image_take_no_part() -> None:
    queries, keys = embeddings(2), embeddings(2, 1)
    stored = embeddings(4, 2)
    ids, tags = torch.tensor([5, 6]), torch.ones(2, 4)
    for same_image in (True, False):
        contrast = full(queue_size=4, mask_same_image=same_image)
        contrast.enqueue(stored, torch.tensor([5, 5, 7, 6]), torch.ones(4, 4))
        out = contrast(queries, keys, ids, tags)
        kept = torch.tensor([[False, False, True, True], [True, True, True, False]])
        for name, scale in (("ii", 0.2), ("cc", 0.2), ("ic", 1.0), ("ci", 1.0)):
            positive, negatives = (queries[name] * keys[name]).sum(1) / scale, queries[name] @ stored[name].T / scale
            mask = kept if same_image else None
            if scale == 1.0:
                expected = cross_modal_loss(positive, negatives, mask=mask).mean()
            else:
                expected = instance_loss(positive, negatives, mask).mean()
            torch.testing.assert_close(out[name], expected)
        assert out["positives"] == (3.5 if same_image else 5.0)


@pytest.mark.parametrize("same_image", [True, False])
def test_reports_and_positives_count_the_slots_that_count(same_image: bool) -> None:
    # Slots 0 and 2 show the images of anchors 0 and 1 and beat their keys. Slot 3 ties with anchor 1's key.
    similar = torch.tensor([[1.0, 0.25, 0.5, 0.0], [0.5, 0.0, 1.0, 0.75]])
    ids = torch.tensor([5, 6])
    contrast = full(queue_size=4, margin=0.5, temperature=0.25, mask_same_image=same_image)
    rows = {name: torch.eye(2, dim) for name, dim in WIDTHS.items()}
    stored = {name: similar.T @ row for name, row in rows.items()}
    contrast.enqueue(stored, torch.tensor([5, 7, 6, 7]), torch.tensor([[1, 0, 0, 0]] * 3 + [[0, 1, 0, 0]]))
    out = contrast(rows, {name: 0.75 * row for name, row in rows.items()}, ids, torch.tensor([[1, 0, 0, 0]] * 2))
    for name in WIDTHS:
        assert out[f"accuracy_{name}"] == (0.5 if same_image else 0.0)
    for name in ("ic", "ci"):  # 0.25 equals the margin, so it doesn't count
        assert out[f"active_{name}"] == (1.5 if same_image else 2.5)
    mask = torch.tensor([[False, True, True, True], [True, True, False, True]]) if same_image else None
    related = torch.tensor([[True, True, True, False]]).expand(2, 4)
    torch.testing.assert_close(out["tag"], tag_loss(torch.full((2,), 3.0), 4 * similar, related, mask).mean())


def test_infonce_between_modalities_is_the_instance_loss_at_its_own_temperature() -> None:
    contrast, stored = objective(inter_loss="infonce", temperature_cross=0.3, queue_size=4), embeddings(4, 2)
    contrast.enqueue(stored, torch.tensor([5, 7, 8, 9]))
    queries, keys = embeddings(2), embeddings(2, 1)
    out = contrast(queries, keys, torch.tensor([5, 6]))
    mask = torch.tensor([[False, True, True, True], [True, True, True, True]])
    for name in ("ic", "ci"):
        scores = (queries[name] * keys[name]).sum(1) / 0.3, queries[name] @ stored[name].T / 0.3
        torch.testing.assert_close(out[name], instance_loss(*scores, mask).mean())
        assert torch.equal(cross_modal_loss(*scores, "infonce", mask=mask), instance_loss(*scores, mask))
        assert f"active_{name}" not in out


# -- the first steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inter_loss", ["hinge", "infonce"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_masked_queues_give_a_first_step_without_loss_or_gradient(inter_loss: Any, reduction: Any) -> None:
    contrast = full(queue_warm="masked", inter_loss=inter_loss, inter_reduction=reduction)
    queries = {name: query.requires_grad_() for name, query in embeddings(3).items()}
    keys = embeddings(3, 1)
    out = contrast(queries, keys, torch.arange(3), tags_of(3))
    out["loss"].backward()
    assert out["loss"] == 0
    assert all(torch.equal(query.grad, torch.zeros_like(query)) for query in queries.values())  # type: ignore[arg-type]
    assert out["queue_fill"] == 0
    assert out["positives"] == out["accuracy_ii"] == 1
    contrast.enqueue(keys, torch.arange(3), tags_of(3))
    out = contrast(queries, keys, torch.arange(3) + 3, tags_of(3))
    assert out["loss"] > 0
    assert out["queue_fill"] == 0.25


# -- precision and layout ----------------------------------------------------------------------------------------------


def test_autocast_and_half_precision_embeddings_are_computed_in_float32() -> None:
    contrast = full()
    queries, keys = embeddings(3), embeddings(3, 1)
    half_queries = {name: query.bfloat16().requires_grad_() for name, query in queries.items()}
    half_keys = {name: key.bfloat16() for name, key in keys.items()}
    reference = contrast(
        {name: query.detach().float() for name, query in half_queries.items()},
        {name: key.float() for name, key in half_keys.items()},
        torch.arange(3),
        tags_of(3),
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = contrast(half_queries, half_keys, torch.arange(3), tags_of(3))
    for name, value in out.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, reference[name])
    out["loss"].backward()
    with torch.autocast("cpu", torch.bfloat16):
        contrast.enqueue(half_keys, torch.arange(3), tags_of(3))
    assert all(query.grad is not None for query in half_queries.values())


def test_gradient_flows_to_queries_only_and_reading_changes_nothing() -> None:
    contrast = full()
    before = {name: value.clone() for name, value in contrast.state_dict().items()}
    queries = {name: query.requires_grad_() for name, query in embeddings(3).items()}
    keys = {name: key.requires_grad_() for name, key in embeddings(3, 1).items()}
    arguments = queries, keys, torch.arange(3), tags_of(3)
    with torch.inference_mode():  # validation may run first
        validated = contrast(*arguments)
    out = contrast(*arguments)
    out["loss"].backward()
    torch.testing.assert_close(validated["loss"], out["loss"].detach())
    assert all(query.grad is not None for query in queries.values())
    assert all(key.grad is None for key in keys.values())
    assert all(torch.equal(before[name], value) for name, value in contrast.state_dict().items())
    contrast.enqueue(*arguments[1:])
    assert not any(torch.equal(before[name], value) for name, value in contrast.state_dict().items())


def test_the_gradient_is_that_of_the_loss() -> None:
    contrast = full(weight_ii=0.7, weight_tag=0.3, weight_cc=2.0, weight_cross=5.0).double()
    keys = {name: key.double() for name, key in embeddings(3, 1).items()}
    names = list(WIDTHS)
    contrast.enqueue(keys, torch.arange(3), tags_of(3))

    def loss(*queries: Tensor) -> Tensor:
        return contrast(dict(zip(names, queries)), keys, torch.arange(3) + 2, tags_of(3, 1))["loss"]

    assert torch.autograd.gradcheck(loss, tuple(q.double().requires_grad_() for q in embeddings(3).values()))


# -- restore -----------------------------------------------------------------------------------------------------------


def test_each_queue_starts_from_a_seed_of_its_own() -> None:
    # Each queue and each seed gives different vectors, which are the same as in earlier versions.
    for position, queue in enumerate(full(seed=2).queues.values()):
        assert torch.equal(queue.vectors, KeyQueue(12, queue.dim, seed=4 * 2 + position).vectors)
