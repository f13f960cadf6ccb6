"""Test the single encoder of MCT's comparison: parameters, masking, matching, and the effect of padding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from assemble.stages.cli import build
from assemble.stages.run import stage_configuration
from common.encoders.text import BertEncoder
from papers.mct.baselines.one_encoder import OneEncoder, mask_words, with_places
from tests.distributed.harness import run_distributed
from tests.stages import request

BATCH, VOCABULARY, MASK = 8, 20, 4


class Map(nn.Module):
    """An image encoder without batch statistics, whose map has four positions."""

    feature_dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 4, 4)

    def forward_map(self, images: Tensor) -> Tensor:
        return torch.tanh(self.convolution(images))


def module(**options: Any) -> Any:
    """Make the module. Its attribute `logged` collects the logged metrics."""
    torch.manual_seed(0)
    text = BertEncoder(None, VOCABULARY, 8, 2, 2, 16, max_tokens=9, dropout=0.0, initializer_range=0.5)
    found = OneEncoder(Map(), text, **{"candidates": 4, **options})
    found.logged = {}  # type: ignore[assignment]
    found.log_dict = lambda metrics, **kwargs: found.logged.update(metrics)  # type: ignore
    return found


def some_batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    batch = {"image_query": torch.randn(BATCH, 3, 8, 8, generator=draw), "image_id": torch.arange(BATCH)}
    for view in ("query", "key"):
        tokens = torch.randint(5, VOCABULARY, (BATCH, 7), generator=draw)
        for row in range(BATCH):
            tokens[row, 6 - row % 3 :] = 0
        batch[f"tokens_{view}"], batch[f"lengths_{view}"] = tokens, (tokens != 0).sum(1)
        batch[f"tokens_{view}_masked"] = tokens.clone()
        batch[f"tokens_{view}_masked"][:, 2] = MASK
        batch[f"tokens_{view}_masked"][::3, 3] = MASK
    return with_places(batch)


def gradients_of(batch: dict[str, Tensor], found: OneEncoder) -> dict[str, Tensor]:
    found.zero_grad()
    found.training_step(batch, 0).backward()
    return {name: parameter.grad.clone() for name, parameter in found.named_parameters() if parameter.grad is not None}


# -- network -----------------------------------------------------------------------------------------------------------


def size_of(recipe: str, tmp_path: Path) -> int:
    stage = request(f"mct/{recipe}", tmp_path, scale="mini")
    model: Any = build(stage.configuration, stage_configuration(stage)).model.model
    towers = (model.image, model.text)
    backbones = [one["backbone"] if isinstance(one, nn.ModuleDict) else one.backbone for one in towers]
    return sum(parameter.numel() for one in backbones for parameter in one.parameters())


def test_backbones_are_those_of_the_towers(tmp_path: Path) -> None:
    assert size_of("one_encoder", tmp_path) == size_of("mct", tmp_path) == 294_592


def test_padding_changes_no_score_and_no_loss() -> None:
    found, batch = module(), some_batch()
    longer = dict(batch)
    for name in batch:
        if name.startswith("tokens"):
            longer[name] = nn.functional.pad(batch[name], (0, 2))
    torch.testing.assert_close(found.training_step(with_places(longer), 0), found.training_step(batch, 0))
    image, tokens = found.model.start_images(batch["image_query"]), batch["tokens_key"]
    whole = found.scores_of_all(image, tokens)
    torch.testing.assert_close(found.scores_of_all(image, longer["tokens_key"]), whole)
    for row, length in enumerate((tokens != 0).sum(1).tolist()):
        alone = tokens[row : row + 1, :length]
        score = found.model.scores(image, found.model.start_captions(alone), alone)
        torch.testing.assert_close(score[:, 0], whole[:, row])


def test_the_loss_is_the_sum_and_the_image_meets_the_caption_that_follows_its_flip() -> None:
    found, read = module(), []
    masked_words = found.masked_words

    def watched(batch: dict[str, Tensor], view: str, image: Tensor | None = None) -> Tensor:
        read.append((view, image is not None))
        return masked_words(batch, view, image)

    found.masked_words = watched
    found.training_step(some_batch(), 0)
    assert read == [("key", True), ("query", False)]
    parts = [found.logged[f"train/{name}"] for name in ("match", "words", "words_alone")]
    torch.testing.assert_close(found.logged["train/loss"], torch.stack(parts).sum())


# -- what is masked and matched ----------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.integers(5, 19), max_size=9), st.sampled_from([0.0, 0.15, 1.0]), st.integers(0, 99))
def test_words_are_masked_and_boundary_tokens_are_not(words: list[int], share: float, seed: int) -> None:
    tokens = [2, *words, 3]
    masked = mask_words(tokens, share, MASK, np.random.default_rng(seed))
    assert (len(masked), masked[0], masked[-1]) == (len(tokens), 2, 3)
    changed = [place for place in range(len(tokens)) if masked[place] != tokens[place]]
    assert all(masked[place] == MASK for place in changed)
    least = {0.0: min(1, len(words)), 0.15: min(1, len(words)), 1.0: len(words)}[share]
    assert least <= len(changed) <= (least if share in (0.0, 1.0) else len(words))


@pytest.mark.parametrize("why", ["image", "words"])
def test_what_shows_the_same_is_no_negative(why: str) -> None:
    """Pairs 0 and 2 are in one group. If they have the same image or words, their two cross scores have no gradient."""
    found, batch = module(), some_batch()
    if why == "image":
        batch["image_id"][2] = 0
    else:
        batch["tokens_key"][2], batch["lengths_key"][2] = batch["tokens_key"][0], batch["lengths_key"][0]
    kept: list[Tensor] = []
    scores = found.model.scores

    def watched(*pairs: Tensor) -> Tensor:
        kept.append(scores(*pairs))
        kept[-1].retain_grad()
        return kept[-1]

    found.model.scores = watched
    found.match(batch, found.model.start_images(batch["image_query"])).backward()
    counted = torch.ones(4, 4, dtype=torch.bool)
    counted[0, 1] = counted[1, 0] = False
    # There are two groups of four: samples 0, 2, 4, 6 and samples 1, 3, 5, 7.
    assert [one.shape for one in kept] == [(4, 4), (4, 4)]
    assert kept[0].grad is not None
    assert torch.equal(kept[0].grad != 0, counted)
    assert kept[1].grad is not None
    assert (kept[1].grad != 0).all()


# -- data --------------------------------------------------------------------------------------------------------------


def test_views_are_those_of_the_towers(tmp_path: Path) -> None:
    samples = []
    for recipe in ("mct", "one_encoder"):
        stage = request(f"mct/{recipe}", tmp_path)
        data: Any = build(stage.configuration, stage_configuration(stage)).datamodule
        data.prepare_data()
        data.setup("fit")
        samples.append(data.training_images[(3, 5)])
    plain, masked = samples
    assert masked.keys() - plain.keys() == {"tokens_query_masked", "tokens_key_masked"}
    for name, value in plain.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(masked[name])), name
    assert "image_key" not in data.collate([masked, masked])  # the module never reads this view


def test_a_batch_is_whole_groups_on_each_device() -> None:
    found = module(candidates=4)
    data = SimpleNamespace(batch_size=8)
    found._trainer = SimpleNamespace(datamodule=data, world_size=4, ckpt_path="last.ckpt", gradient_clip_val=None)
    with pytest.raises(ValueError, match=r"data\.batch_size is 8, .* multiple of .* \(4 x 4 = 16\)"):
        found.setup("fit")


# -- devices -----------------------------------------------------------------------------------------------------------


def part_of_gradients(rank: int, batch: dict[str, Tensor]) -> Any:
    return gradients_of(with_places({name: value[rank::2] for name, value in batch.items()}), module())


def test_two_processes_have_the_gradient_of_the_joined_batch() -> None:
    batch = {name: value for name, value in some_batch().items() if not name.startswith(("places", "targets"))}
    expected = gradients_of(with_places(dict(batch)), module())
    parts = run_distributed(part_of_gradients, 2, batch)
    for name, gradient in expected.items():
        mean = sum(part[name] for part in parts) / 2
        np.testing.assert_allclose(mean, gradient.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


# -- retrieval ---------------------------------------------------------------------------------------------------------


def test_own_ranks_are_those_of_the_scores() -> None:
    """Rank five captions of three images. Two captions are equal, and text 4 belongs to an image that can't be read."""
    found, batch = module().eval(), some_batch()
    images, tokens = batch["image_query"][:3], batch["tokens_key"][:5].clone()
    tokens[3] = tokens[0]
    owner = torch.tensor([0, 1, 2, 2, 5])
    found.on_test_start()
    found.test_step({"image": images, "index": torch.arange(3)}, 0)
    lengths = (tokens != 0).sum(1)
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3, 4])):
        found.test_step(
            {"tokens": tokens[rows], "lengths": lengths[rows], "index": rows, "image_index": owner[rows]}, 0, 1
        )
    found.on_test_epoch_end()
    scores = torch.cat([
        found.model.scores(found.model.start_images(images), found.model.start_captions(one), one)
        for one in tokens[:4, None]
    ], 1)  # fmt: skip
    first = [float((scores[:, column] >= scores[own, column]).sum() == 1) for column, own in enumerate([0, 1, 2, 2])]
    assert found.logged["test/t2i_r1"] == pytest.approx(100 * sum(first) / 4)
    # Captions 0 and 3 have the same words, so each is correct for images 0 and 2.
    right = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    best = scores.where(right, -torch.inf), scores.where(~right, -torch.inf)
    for name, axis in (("t2i", 0), ("i2t", 1)):
        hits = best[0].amax(axis) > best[1].amax(axis)
        assert found.logged[f"test/{name}_r1_equal_text"] == pytest.approx(100 * hits.float().mean()), name
    assert found.logged["test/t2i_chance_medr"] == 1.5


def part_of_retrieval(rank: int, images: int, processes: int) -> dict[str, float]:
    """Return what a process logs for every `processes`-th image and caption."""
    found, batch = module().eval(), some_batch()
    found.on_test_start()
    rows = torch.arange(BATCH)[rank::processes]
    own = rows[rows < images]
    if len(own):
        found.test_step({"image": batch["image_query"][own], "index": own}, 0)
    found.test_step(
        {
            "tokens": batch["tokens_key"][rows], "lengths": batch["lengths_key"][rows], "index": rows,
            "image_index": rows % images,
        }, 0, 1,
    )  # fmt: skip
    found.on_test_epoch_end()
    return {name: float(value) for name, value in found.logged.items()}


@pytest.mark.parametrize("images", [1, 5])
def test_two_processes_find_what_one_finds(images: int) -> None:
    expected = part_of_retrieval(0, images, 1)
    for found in run_distributed(part_of_retrieval, 2, images, 2):
        assert found == pytest.approx(expected)
