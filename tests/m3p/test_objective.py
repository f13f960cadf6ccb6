"""The losses against the released code's numbers, with the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from papers.m3p.checkpoints import released_name
from papers.m3p.objective import (
    WeightSchedule,
    all_pairs,
    contrast,
    relation_terms,
    text_terms,
    with_places,
)
from tests.m3p.tiny import arrays, tiny_model, valid, values


def golden_group() -> dict[str, torch.Tensor]:
    golden = arrays("pretrain_losses")
    tokens = golden["token_ids_LxN"].T
    return {
        "tokens": tokens,
        "token_mask": valid(golden["lengths"], tokens.shape[1]),
        "word_labels": golden["mlm_labels_LxN"].T,
        "regions": golden["masked_features_l2"],
        "boxes": golden["loc"],
        "region_mask": torch.ones(8, 5, dtype=torch.bool),
        "region_labels": golden["region_labels"],
        "region_targets": golden["original_features"],
        "positive": golden["positive_index"],
    }


def terms_of(model: Any, kind: str, group: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    found = with_places({"xmlm": [], "relations": [{kind: group}]})["relations"][0][kind]
    return relation_terms(model, found, kind, **options)


def test_losses_and_gradients_are_those_of_the_released_code() -> None:
    golden, model = arrays("pretrain_losses"), tiny_model()
    terms = terms_of(model, "t2i", golden_group())
    for name, key in (
        ("mlm", "loss_mlm"), ("mrm_class", "loss_mrc"), ("mrm_regression", "loss_mrfr"),
        ("vlm_ce", "loss_vlm_ce"), ("vlm_bce", "loss_vlm_bce"),
    ):  # fmt: skip
        torch.testing.assert_close(terms[name].double(), golden[key], rtol=0, atol=1e-5)
    total = sum(value for name, value in terms.items() if name != "accuracy")
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total.double(), golden["loss_total"], rtol=0, atol=2e-5)
    total.backward()
    expected = values("pretrain_grad_norms")
    found = {released_name(n): p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    for name in found.keys() & expected.keys():
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert expected.keys() - found.keys() <= {"pred_layer.proj.weight"}  # the table of words under its other name
    assert found.keys() - expected.keys() <= {"pred_layer.proj.bias"} | set(found)


def test_logits_of_all_pairs_are_those_of_the_released_code() -> None:
    golden, model, group = arrays("pretrain_losses"), tiny_model(), golden_group()
    hidden = model.encoder(group["tokens"], group["token_mask"], group["regions"], group["boxes"])
    torch.testing.assert_close(model.match(hidden[:, 0]), golden["relation_logits"], rtol=0, atol=2e-5)


def test_text_loss_is_that_of_the_released_code() -> None:
    golden, model = arrays("xmlm_loss"), tiny_model()
    tokens, masked = golden["token_ids_LxB"].T, golden["pred_mask_LxB"]
    labels = torch.full(masked.shape, -1)
    labels[masked] = golden["targets"]  # in the order of the released arrays, positions first
    block = {"tokens": tokens, "token_mask": valid(golden["lengths"], 9), "labels": labels.T}
    found = with_places({"xmlm": [block], "relations": []})["xmlm"][0]
    torch.testing.assert_close(text_terms(model, found)["xmlm"].double(), golden["loss"], rtol=0, atol=1e-5)
    hidden = model.encoder(tokens, block["token_mask"])
    torch.testing.assert_close(model.words(hidden.transpose(0, 1)[masked]), golden["logits"], rtol=0, atol=2e-5)


def in_batch_group() -> dict[str, torch.Tensor]:
    group = golden_group()
    rows = torch.tensor([0, 2, 5])
    group = {name: value[rows] for name, value in group.items() if name != "positive"}
    group["word_labels"] = torch.where(torch.arange(9) == 1, group["tokens"], -1)
    return group


def test_pairs_in_a_batch_are_scored_as_each_pair_alone() -> None:
    model, group = tiny_model(), in_batch_group()
    images = torch.arange(3).repeat_interleave(3)
    texts = torch.arange(3).repeat(3)
    hidden = model.encoder(
        group["tokens"][texts], group["token_mask"][texts], group["regions"][images], group["boxes"][images]
    )
    scores = model.match(hidden[:, 0]).view(3, 3)
    target = torch.arange(3)
    terms = terms_of(model, "in_batch", group)
    expected = 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))
    torch.testing.assert_close(terms["vlm_ce"], expected)
    torch.testing.assert_close(terms["vlm_bce"], F.binary_cross_entropy_with_logits(scores, torch.eye(3)))
    own = hidden[[0, 4, 8], 5:].flatten(0, 1)
    labels = group["word_labels"].flatten()
    torch.testing.assert_close(terms["mlm"], F.cross_entropy(model.words(own[labels >= 0]), labels[labels >= 0]))


@pytest.mark.parametrize("kind", ["t2i", "in_batch"])
def test_generic_supervisions_train_all_they_should(kind: str) -> None:
    model = tiny_model()
    group = golden_group() if kind == "t2i" else in_batch_group()
    with pytest.raises(ValueError, match="distributions"):
        terms_of(model, kind, group, soft_classes=True)
    group["region_distributions"] = F.one_hot(group["region_labels"].clamp(min=0), 1600).float()
    terms = terms_of(model, kind, group, soft_classes=True, alignment=True)
    assert {"alignment", "itm", "mrm_class"} <= terms.keys()
    hard = terms_of(model, kind, group)["mrm_class"]
    torch.testing.assert_close(terms["mrm_class"] * 1600, hard, rtol=1e-4, atol=1e-5)  # a mean over elements
    (terms["alignment"] + terms["itm"]).backward()
    assert model.encoder.region.feature.weight.grad.abs().sum() > 0


def test_nothing_masked_costs_nothing_and_keeps_the_graph() -> None:
    model, group = tiny_model(), golden_group()
    group["word_labels"] = torch.full_like(group["word_labels"], -1)
    group["region_labels"] = torch.full_like(group["region_labels"], -1)
    terms = terms_of(model, "i2t", group)
    assert terms["mlm"] == terms["mrm_class"] == terms["mrm_regression"] == 0
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "encoder.language.weight")


def test_a_constant_scorer_is_never_right() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.match.score.weight.zero_()
    terms = terms_of(model, "t2i", golden_group())
    assert terms["accuracy"] == 0
    assert terms["vlm_ce"].item() == pytest.approx(1.3863, abs=1e-4)


@pytest.mark.parametrize(
    ("points", "at"),
    [
        (2, {0: 2.0, 10**6: 2.0}),
        ("0.5", {7: 0.5}),
        ("0:1,1000:0", {0: 1.0, 250: 0.75, 1000: 0.0, 5000: 0.0}),
        ("0:0,10:0,20:1", {5: 0.0, 15: 0.5, 20: 1.0}),
    ],
)
def test_weights_move_in_straight_lines(points: Any, at: dict[int, float]) -> None:
    schedule = WeightSchedule(points)
    assert {iteration: schedule(iteration) for iteration in at} == pytest.approx(at)
    assert schedule.ever


@pytest.mark.parametrize("points", ["5:1", "0:1,0:2", "0:1,9:2,3:0", "abc", "0:1,x:2", ""])
def test_a_wrong_schedule_is_an_error(points: str) -> None:
    with pytest.raises(ValueError, match="weight"):
        WeightSchedule(points)


def test_a_weight_that_is_never_on() -> None:
    assert not WeightSchedule(0).ever
    assert not WeightSchedule("0:0,9:0").ever


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_all_pairs(images: int, texts: int, regions: int, words: int) -> None:
    left, right = torch.rand(images, regions, 2), torch.rand(texts, words, 2)
    pairs = all_pairs(left, right)
    for i in range(images):
        for j in range(texts):
            torch.testing.assert_close(pairs[i * texts + j], torch.cat([left[i], right[j]]))


def test_contrast_finds_the_own_one() -> None:
    rows = torch.eye(4)
    loss, found = contrast(rows, rows, 0.05)
    assert found == 1
    assert loss < 1e-6
    assert contrast(rows, rows.roll(1, 0), 0.05)[1] == 0
