"""Compare the losses with the released code's numbers, including the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from common.losses.alignment import word_region_alignment
from common.losses.matching import image_text_matching, in_batch_matching
from common.memory.collective import share_of_mean
from papers.m3p.encoder import M3P, M3PEncoder
from papers.m3p.loss import pair_terms, text_terms
from papers.m3p.pairs import InBatch, PairGroup
from papers.m3p.weights import RELEASED
from tests.m3p.tiny import MASKED, arrays, joint, placed, tiny_model, tiny_sizes, valid, values


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


def block_of(tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make a block of text in the format of `MultitaskSteps`."""
    places = (labels >= 0).flatten().nonzero()[:, 0]
    return {
        "tokens": tokens, "token_mask": mask, "word_places": places, "word_targets": labels.flatten()[places]
    }  # fmt: skip


def terms_of(
    model: Any, group: dict[str, torch.Tensor], soft_classes: bool = False, temperature: float = 0.1, **weights: float
) -> dict[str, torch.Tensor]:
    return pair_terms(model, placed(group), MASKED | weights, soft_classes, temperature)


def test_losses_and_gradients_are_those_of_the_released_code() -> None:
    golden, model = arrays("pretrain_losses"), tiny_model()
    terms = terms_of(model, golden_group())
    for name, key in (
        ("mlm", "loss_mlm"), ("mrm_class", "loss_mrc"), ("mrm_regression", "loss_mrfr"),
        ("vlm_ce", "loss_vlm_ce"), ("vlm_bce", "loss_vlm_bce"),
    ):  # fmt: skip
        torch.testing.assert_close(terms[name].double(), golden[key], rtol=0, atol=2e-6)
    total = sum(value for name, value in terms.items() if name != "accuracy")
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total.double(), golden["loss_total"], rtol=0, atol=5e-6)
    total.backward()
    expected = values("pretrain_grad_norms")
    found = {RELEASED[n]: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == pytest.approx(expected[name], rel=3e-6, abs=1e-6), name


def test_logits_of_all_pairs_are_those_of_the_released_code() -> None:
    golden, model, group = arrays("pretrain_losses"), tiny_model(), golden_group()
    hidden = joint(model, group["tokens"], group["token_mask"], group["regions"], group["boxes"])
    torch.testing.assert_close(model.match_head(hidden[:, 0]), golden["relation_logits"], rtol=0, atol=1e-6)


def test_text_loss_is_that_of_the_released_code() -> None:
    golden, model = arrays("xmlm_loss"), tiny_model()
    tokens, masked = golden["token_ids_LxB"].T, golden["pred_mask_LxB"]
    labels = torch.full(masked.shape, -1)
    labels[masked] = golden["targets"]  # the released arrays put positions first
    block = block_of(tokens, valid(golden["lengths"], 9), labels.T)
    torch.testing.assert_close(text_terms(model, block)["xmlm"].double(), golden["loss"], rtol=0, atol=2e-6)
    hidden = model.encoder(tokens, block["token_mask"])
    torch.testing.assert_close(model.words(hidden.transpose(0, 1)[masked]), golden["logits"], rtol=0, atol=4e-6)


def in_batch_group() -> dict[str, torch.Tensor]:
    group = golden_group()
    rows = torch.tensor([0, 2, 5])
    group = {name: value[rows] for name, value in group.items() if name != "positive"}
    group["word_labels"] = torch.where(torch.arange(9) == 1, group["tokens"], -1)
    return group


@pytest.mark.parametrize("kind", ["t2i", "in_batch"])
def test_generic_supervisions_train_all_they_should(kind: str) -> None:
    model = tiny_model()
    group = golden_group() if kind == "t2i" else in_batch_group()
    group["region_distributions"] = F.one_hot(group["region_labels"].clamp(min=0), 1600).float()
    terms = terms_of(model, group, soft_classes=True, alignment=1.0)
    assert {"alignment", "itm", "mrm_class"} <= terms.keys()
    hard = terms_of(model, group)["mrm_class"]
    torch.testing.assert_close(terms["mrm_class"] * 1600, hard, rtol=1e-4, atol=1e-5)  # the mean is over 1,600 classes
    (terms["alignment"] + terms["itm"]).backward()
    assert model.encoder.region.feature.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["t2i", "in_batch"])
def test_alignment_and_matching_are_of_a_true_and_the_next_pair_of_each_group(kind: str) -> None:
    model = tiny_model()
    group = golden_group() if kind == "t2i" else in_batch_group()
    group["region_mask"] = group["region_mask"].clone()
    group["region_mask"][1, 3:] = False
    if kind == "t2i":
        group["positive"] = torch.tensor([1, 2])
        true = torch.arange(0, 8, 4) + group["positive"]
        false = torch.arange(0, 8, 4) + (group["positive"] + 1) % 4
        images = texts = torch.cat([true, false])
    else:
        images, texts = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 2, 1, 2, 0])
    matched = torch.arange(len(images)) < len(images) // 2
    image_mask, text_mask = group["region_mask"][images], group["token_mask"][texts]
    inputs = group["tokens"][texts], text_mask, group["regions"][images], group["boxes"][images], image_mask
    hidden = joint(model, *inputs)
    terms = terms_of(model, group, alignment=1.0)
    expected = word_region_alignment(hidden[:, 5:], hidden[:, :5], text_mask, image_mask, matched)
    torch.testing.assert_close(terms["alignment"], expected, rtol=1e-4, atol=1e-5)
    yes = model.match_head(hidden[:, 0])
    expected = image_text_matching(torch.stack([torch.zeros_like(yes), yes], 1), matched)
    torch.testing.assert_close(terms["itm"], expected, rtol=1e-4, atol=1e-5)
    assert {"alignment", "itm"}.isdisjoint(terms_of(model, group))


def test_a_false_pair_never_shows_the_same_where_another_does_not() -> None:
    def rows(*groups: int) -> dict[str, list[int]]:
        pairs = InBatch().rows([PairGroup([], [], 0, {}, group) for group in groups])
        return {name: column.tolist() for name, column in pairs.items()}

    # Image 0's next caption shows the same image, so the negative is the caption after the next.
    assert rows(4, 4, 9) == {"group": [4, 4, 9], "true": [0, 4, 8], "false": [0 * 3 + 2, 1 * 3 + 2, 2 * 3 + 0]}
    assert rows(4, 4, 4)["false"] == [1, 3 + 2, 6 + 0]


def test_accuracy_is_the_share_of_groups_whose_true_pair_scores_highest() -> None:
    model, group = tiny_model(), golden_group()
    hidden = joint(model, group["tokens"], group["token_mask"], group["regions"], group["boxes"])
    best = model.match_head(hidden[:, 0]).view(2, 4).argmax(1)
    for others, accuracy in (([0, 0], 1.0), ([1, 0], 0.5), ([2, 3], 0.0)):
        group["positive"] = (best + torch.tensor(others)) % 4
        assert terms_of(model, group)["accuracy"] == accuracy


def test_pairs_are_scored_as_each_alone_without_those_that_show_the_same_and_the_contrast_is_of_means() -> None:
    model, group = tiny_model(), in_batch_group() | {"group": torch.tensor([4, 4, 9])}
    found = terms_of(model, group, contrast=1.0, temperature=0.3)
    alone = {name: value for name, value in group.items() if name != "group"}
    images, texts = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3)
    inputs = group["tokens"][texts], group["token_mask"][texts], group["regions"][images], group["boxes"][images]
    hidden = joint(model, *inputs)
    for name, expected in zip(
        ("vlm_ce", "vlm_bce"), in_batch_matching(model.match_head(hidden[:, 0]).view(3, 3), group["group"])
    ):
        torch.testing.assert_close(found[name], expected)
    own, labels = hidden[[0, 4, 8], 5:].flatten(0, 1), group["word_labels"].flatten()
    torch.testing.assert_close(found["mlm"], F.cross_entropy(model.words(own[labels >= 0]), labels[labels >= 0]))
    words = model.encoder.token(group["tokens"])
    text = torch.stack([rows[mask].mean(0) for rows, mask in zip(words, group["token_mask"])])
    image = model.encoder.region(group["regions"], group["boxes"]).mean(1)
    scores = F.cosine_similarity(image[:, None], text[None], dim=2) / 0.3
    torch.testing.assert_close(found["contrast"], in_batch_matching(scores, group["group"])[0])
    found = terms_of(model, alone, contrast=1.0, temperature=0.3)
    torch.testing.assert_close(found["contrast"], in_batch_matching(scores)[0])
    assert "contrast" not in terms_of(model, alone)
    # The mean ignores masked regions.
    alone["region_mask"] = torch.arange(5).expand(3, 5) < 3
    image = model.encoder.region(group["regions"], group["boxes"])[:, :3].mean(1)
    scores = F.cosine_similarity(image[:, None], text[None], dim=2) / 0.3
    found = terms_of(model, alone, contrast=1.0, temperature=0.3)
    torch.testing.assert_close(found["contrast"], in_batch_matching(scores)[0])


def test_what_is_not_predicted_has_no_term() -> None:
    model, group = tiny_model(), golden_group()
    assert "mlm" not in terms_of(model, group, mlm=0.0)
    assert {"mrm_class", "mrm_regression"}.isdisjoint(terms_of(model, group, mrm_class=0.0, mrm_regression=0.0))
    unlabeled = {name: value for name, value in placed(group).items() if "places" not in name}
    assert pair_terms(model, unlabeled, MASKED).keys() == {"vlm_ce", "vlm_bce", "accuracy"}


def test_texts_are_read_in_their_languages() -> None:
    golden, model = arrays("xmlm_loss"), tiny_model()
    tokens, mask = golden["token_ids_LxB"].T, valid(golden["lengths"], 9)
    block = block_of(tokens, mask, torch.where(torch.arange(9) == 1, tokens, -1))
    block["languages"] = torch.arange(len(tokens)) % 6
    found = text_terms(model, block)["xmlm"]
    hidden = model.encoder(tokens, mask, languages=block["languages"])
    torch.testing.assert_close(found, F.cross_entropy(model.words(hidden[:, 1]), tokens[:, 1]))
    assert (hidden - model.encoder(tokens, mask)).abs().max() > 1e-3


def test_means_over_masked_things_are_over_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, group = tiny_model(), golden_group()
    text, relation = block_of(group["tokens"], group["token_mask"], group["word_labels"]), placed(group)
    alone = text_terms(model, text) | pair_terms(model, relation, MASKED)
    monkeypatch.setattr("common.memory.collective.is_distributed", lambda: True)
    monkeypatch.setattr("common.memory.collective.mean_over_ranks", lambda count: count + 1)
    together = text_terms(model, text) | pair_terms(model, relation, MASKED)
    words, regions = len(relation["word_places"]), len(relation["region_places"])
    for name, count in (
        ("xmlm", len(text["word_places"])), ("mlm", words), ("mrm_class", regions), ("mrm_regression", regions),
    ):  # fmt: skip
        torch.testing.assert_close(together[name], alone[name] * count / (count + 1))
    monkeypatch.setattr("common.memory.collective.mean_over_ranks", lambda count: count)
    assert share_of_mean(0, torch.device("cpu")) == 0
    assert share_of_mean(1, torch.device("cpu")) == 1
    monkeypatch.setattr("common.memory.collective.mean_over_ranks", lambda count: count / 2)
    assert share_of_mean(1, torch.device("cpu")) == 2


@pytest.mark.parametrize("kind", ["t2i", "in_batch"])
def test_terms_make_what_they_need_on_the_device_of_their_inputs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(count: torch.Tensor) -> torch.Tensor:
        assert count.device.type == "cuda"
        return count

    monkeypatch.setattr("common.memory.collective.is_distributed", lambda: True)
    monkeypatch.setattr("common.memory.collective.mean_over_ranks", mean)
    group = golden_group() if kind == "t2i" else in_batch_group()
    found = placed(group)
    with FakeTensorMode() as mode:  # tracks shapes and devices only
        with torch.device("cuda"):
            model = M3P(M3PEncoder(**tiny_sizes()))
        there = {name: mode.from_tensor(value).to("cuda") for name, value in found.items()}
        weights = MASKED | {"alignment": 1.0, "contrast": float(kind == "in_batch")}
        for term in pair_terms(model, there, weights).values():
            assert term.device.type == "cuda"
        block = {"tokens": there["tokens"], "token_mask": there["token_mask"], "word_places": there["word_places"]}
        block["word_targets"] = there["word_targets"]
        assert text_terms(model, block)["xmlm"].device.type == "cuda"


def test_nothing_masked_costs_nothing_and_keeps_the_graph() -> None:
    model, group = tiny_model(), golden_group()
    group["word_labels"] = torch.full_like(group["word_labels"], -1)
    group["region_labels"] = torch.full_like(group["region_labels"], -1)
    terms = terms_of(model, group)
    assert terms["mlm"] == terms["mrm_class"] == terms["mrm_regression"] == 0
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "encoder.language.weight")
