"""Test the scores of all pairs and the retrieval. Ties, padding and interruptions must not change the result."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics.retrieval import score_retrieval
from papers.m3p.encoder import M3P, M3PEncoder
from papers.m3p.miniature import MeansTest
from papers.m3p.search import RetrievalTest, exactly, score_pairs
from tests.m3p.tiny import arrays, tiny_sizes, valid, values

IMAGES, CAPTIONS, REGIONS, WIDTH = 7, 13, 3, 9


@pytest.mark.parametrize("name", ["hard", "easy", "one_caption"])
def test_recalls_are_those_of_the_released_evaluator(name: str) -> None:
    scores, expected = (
        arrays("retrieval_scores")[f"{name}_scores_images_x_captions"],
        values("retrieval_expected")[name],
    )
    owner = torch.arange(scores.shape[1]) // expected["captions_per_image"]
    found = score_retrieval(scores, owner)
    for direction in ("t2i", "i2t"):
        for k in (1, 5, 10):
            assert found[f"{direction}_r{k}"].item() == pytest.approx(100 * expected[f"{direction}_R{k}"], abs=1e-9)
    assert found["mr"].item() == pytest.approx(100 * expected["mean_recall"], abs=1e-9)
    shuffled = torch.randperm(len(owner))
    torch.testing.assert_close(score_retrieval(scores[:, shuffled], owner[shuffled]), found)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 6))
def test_every_image_gets_as_many_captions_as_are_asked_for(counts: list[int], each: int) -> None:
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    owner = owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(0))]
    columns = exactly(owner, each)
    assert owner[columns].bincount().tolist() == [each] * len(counts)
    for image, count in enumerate(counts):
        chosen = columns[owner[columns] == image].bincount(minlength=len(owner))
        assert chosen.max() <= -(-each // count)  # no caption repeats before all are used


def model_and_gallery() -> tuple[M3P, tuple[torch.Tensor, ...]]:
    """Return a model and the inputs of `score_pairs`."""
    torch.manual_seed(0)
    model = M3P(M3PEncoder(**tiny_sizes(feature_dim=8)), 4).eval()
    mask = valid(torch.randint(1, REGIONS + 1, (IMAGES,)), REGIONS)
    with torch.inference_mode():
        image = model.encoder.start_regions(torch.randn(IMAGES, REGIONS, 8), torch.rand(IMAGES, REGIONS, 5), mask)
    token_mask = valid(torch.randint(2, WIDTH + 1, (CAPTIONS,)), WIDTH)
    tokens = torch.randint(4, 39, (CAPTIONS, WIDTH)).where(token_mask, 1)
    return model, (image, mask, tokens, token_mask)


def one_by_one(
    model: M3P, image: torch.Tensor, image_mask: torch.Tensor, tokens: torch.Tensor, token_mask: torch.Tensor
) -> torch.Tensor:
    scores = torch.empty(IMAGES, CAPTIONS)
    with torch.inference_mode():
        for i in range(IMAGES):
            for j in range(CAPTIONS):
                text = model.encoder.start_text(tokens[j : j + 1], token_mask[j : j + 1], REGIONS)
                start = torch.cat([image[i : i + 1], text], 1)
                mask = torch.cat([image_mask[i], token_mask[j]])[None]
                scores[i, j] = model.match_head(model.encoder.encode(start, mask)[:, 0])[0]
    return scores


@pytest.mark.parametrize(("budget", "together"), [(1, 1), (60, 4), (10**6, 64)])
def test_tiles_of_any_size_score_each_pair_alone(budget: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papers.m3p.encoder.CAPTIONS_TOGETHER", together)
    model, gallery = model_and_gallery()
    scores = score_pairs(model, *gallery, budget)
    torch.testing.assert_close(scores, one_by_one(model, *gallery), rtol=1e-4, atol=1e-5)


def test_half_precision_makes_no_ties() -> None:
    """Keep scores in float32. In bfloat16 there are hundreds of ties, and a tie counts against the correct item."""
    model, gallery = model_and_gallery()
    with torch.no_grad():
        model.match_head.score.weight.mul_(20.0)
    expected = score_pairs(model, *gallery, 10**6)
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_pairs(model, *gallery, 10**6)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    assert len(scores.unique()) == len(expected.unique())
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.2)
    # Weights in half precision, as with bf16-true, give no ties either.
    half = gallery[0].bfloat16(), *gallery[1:]
    scores = score_pairs(model.bfloat16(), *half, 10**6)
    assert not torch.equal(scores, scores.bfloat16().float())
    assert len(scores.unique()) == len(expected.unique())
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.4)


class Stopped(Exception):
    pass


def test_an_interrupted_scoring_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papers.m3p.encoder.CAPTIONS_TOGETHER", 3)
    model, gallery = model_and_gallery()
    whole = score_pairs(model, *gallery, 10**6)
    tile = M3P.score_tile
    scored: list[int] = []

    def stopping(self: M3P, *args: Any) -> torch.Tensor:
        if len(scored) == 3:
            raise Stopped
        scored.append(1)
        return tile(self, *args)

    monkeypatch.setattr("papers.m3p.search.SAVE_EVERY", 0.0)
    monkeypatch.setattr(M3P, "score_tile", stopping)
    partial = tmp_path / "scores" / "en.0.pt"
    with pytest.raises(Stopped):
        score_pairs(model, *gallery, 10**6, partial)
    scored[:] = [1, 1]  # three of five tiles were saved
    monkeypatch.setattr(M3P, "score_tile", lambda *args: (scored.append(1), tile(*args))[1])
    assert torch.equal(score_pairs(model, *gallery, 10**6, partial), whole)
    assert len(scored) == 4
    # If weights or captions change, all pairs are scored again.
    with torch.no_grad():
        model.match_head.score.bias.add_(1.0)
    torch.testing.assert_close(score_pairs(model, *gallery, 10**6, partial), whole + 1)
    other = *gallery[:2], *(rows.flip(0) for rows in gallery[2:])
    found = score_pairs(model, *other, 10**6, partial)
    torch.testing.assert_close(found, whole.flip(1) + 1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [RetrievalTest, MeansTest])
def test_a_test_joins_images_captions_and_sets(kind: type[RetrievalTest], tmp_path: Path) -> None:
    model, gallery = model_and_gallery()
    features, boxes = torch.randn(IMAGES, REGIONS, 8), torch.rand(IMAGES, REGIONS, 5)
    owners = torch.arange(CAPTIONS) % IMAGES * 10
    owners[5] = 35  # the image of this caption is missing
    captions = {"tokens": gallery[2], "token_mask": gallery[3], "owner": owners}
    sets = [
        SimpleNamespace(
            name=f"multi30k_{one}", language=one, images=0, numbers=torch.arange(CAPTIONS),
            **captions,
        )
        for one in ("en", "de")
    ]  # fmt: skip
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(evaluation_sets=sets), default_root_dir=str(tmp_path), progress_bar_callback=None,
        strategy=SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext)),
    )  # fmt: skip
    test = kind(500, None)
    test.reset(SimpleNamespace(trainer=trainer, device=torch.device("cpu"), model=model))
    with torch.inference_mode():
        for rows in torch.arange(IMAGES).flip(0).split(3):  # the order and the image numbers are arbitrary
            images = {"regions": features[rows], "boxes": boxes[rows], "region_mask": gallery[1][rows]}
            test.update({"index": rows * 10, **images}, 0)
        found = test.compute()
    assert found["multi30k_en_mr"] == found["multi30k_de_mr"] == found["non_english_mr"]
    assert {"multi30k_en_t2i_r1", "multi30k_de_i2t_r10", "multi30k_de_t2i_medr"} <= found.keys()
    assert [result.scores.shape for result in test.results] == [(IMAGES, CAPTIONS - 1)] * 2
    assert not list(tmp_path.rglob("*.pt"))
    kept = torch.tensor([row for row in range(CAPTIONS) if row != 5])
    owner = owners[kept] // 10
    recalls = score_retrieval(test.results[0].scores, owner)
    assert found["multi30k_en_t2i_r5"].item() == pytest.approx(recalls["t2i_r5"].item(), rel=1e-6)
