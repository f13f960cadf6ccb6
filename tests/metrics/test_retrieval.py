"""Test retrieval metrics: the official numbers, the definitions, and edge cases."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.metrics import retrieval
from common.metrics.retrieval import caption_ranks, caption_retrieval, match_ranks, score_retrieval

GOLDEN = Path(__file__).parents[1] / "golden" / "mct" / "retrieval.npz"
NAMES = [f"{direction}_{name}" for direction in ("i2t", "t2i") for name in ("r1", "r5", "r10", "medr", "meanr")]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file}


@pytest.fixture(scope="module")
def owners() -> Tensor:
    return torch.arange(300) // 5


def test_recalls_and_ranks(golden: dict[str, Tensor], owners: Tensor) -> None:
    found = caption_retrieval(golden["image_emb"], golden["caption_emb"], owners)
    expected = torch.cat([golden["i2t_r1_r5_r10_medr_meanr"], golden["t2i_r1_r5_r10_medr_meanr"]])
    assert list(found) == NAMES
    assert [float(value) for value in found.values()] == pytest.approx(expected.tolist(), abs=1e-12)


def test_folds(golden: dict[str, Tensor], owners: Tensor) -> None:
    size = int(golden["fold_size"])
    found = caption_retrieval(golden["image_emb"], golden["caption_emb"], owners, fold_size=size)
    assert [float(value) for value in found.values()] == pytest.approx(golden["mean_over_folds"].tolist(), abs=1e-12)
    for fold, expected in enumerate(golden["per_fold_i2t5_t2i5"]):
        rows = slice(fold * size, (fold + 1) * size)
        captions = golden["caption_emb"][5 * rows.start : 5 * rows.stop]
        part = caption_retrieval(golden["image_emb"][rows], captions, owners[: 5 * size])
        assert [float(value) for value in part.values()] == pytest.approx(expected.tolist(), abs=1e-12)


def recall_at(query: torch.Tensor, gallery: torch.Tensor, k: int) -> torch.Tensor:
    return 100 * (match_ranks(query, gallery) < k).double().mean()


@given(seed=st.integers(0, 1000), queries=st.integers(1, 30), extra=st.integers(0, 10), block=st.integers(1, 40))
def test_ranks_agree_with_sorting_for_any_block(seed: int, queries: int, extra: int, block: int) -> None:
    draw = np.random.default_rng(seed)
    query = torch.from_numpy(draw.standard_normal((queries, 8)))
    gallery = torch.from_numpy(draw.standard_normal((queries + extra, 8)))
    order = (query @ gallery.T).argsort(1, descending=True)
    expected = (order == torch.arange(queries)[:, None]).int().argmax(1)
    with patch.object(retrieval, "_BLOCK", block):
        assert torch.equal(match_ranks(query, gallery), expected)
    for k in (1, 5):
        assert recall_at(query, gallery, k).item() == pytest.approx(100 * (expected < k).double().mean().item())


def test_identity_is_perfect_and_collapse_is_worthless() -> None:
    assert recall_at(torch.eye(6), torch.eye(6), 1).item() == 100
    assert recall_at(torch.ones(6, 3), torch.ones(6, 3), 5).item() == 0
    assert recall_at(torch.full((6, 3), float("nan")), torch.ones(6, 3), 5).item() == 0


def naive_caption_ranks(scores: np.ndarray, caption_image: list[int], text: list[int]) -> tuple[list[int], list[int]]:
    """Compute the ranks by their definition, one query at a time."""
    images, captions = scores.shape
    i2t, t2i = [], []
    for i in range(images):
        own_texts = {text[c] for c in range(captions) if caption_image[c] == i}
        own = [c for c in range(captions) if text[c] in own_texts]
        if own:
            best = max(scores[i, c] for c in own)
            i2t.append(sum(scores[i, c] >= best for c in range(captions) if c not in own))
    for c in range(captions):
        own = [caption_image[other] for other in range(captions) if text[other] == text[c]]
        best = max(scores[i, c] for i in own)
        t2i.append(sum(scores[i, c] >= best for i in range(images) if i not in own))
    return i2t, t2i


class TestCaptions:
    @settings(max_examples=60)
    @given(
        seed=st.integers(0, 10_000),
        images=st.integers(1, 12),
        captions=st.integers(1, 25),
        texts=st.integers(1, 25),
        max_scores=st.integers(1, 200),
        coarse=st.booleans(),
    )
    def test_ranks_follow_the_definition(
        self, seed: int, images: int, captions: int, texts: int, max_scores: int, coarse: bool
    ) -> None:
        draw = np.random.default_rng(seed)
        # An image has any number of captions (or none) in any order. Coarse embeddings often tie.
        image, caption = (
            torch.from_numpy(draw.integers(-1, 2, (rows, 2)).astype(float) if coarse else draw.normal(size=(rows, 4)))
            for rows in (images, captions)
        )
        owner = draw.integers(0, images, captions)
        text = draw.integers(0, texts, captions) * 1_000_003 - 7
        scores = (image @ caption.T).numpy()
        own = torch.from_numpy(owner)
        for equal in (None, torch.from_numpy(text)):
            with torch.device("meta"), patch.object(retrieval, "_SCORES", max_scores):  # must not allocate there
                found = caption_ranks(image, caption, own, equal)
            expected = naive_caption_ranks(
                scores, owner.tolist(), list(range(captions)) if equal is None else text.tolist()
            )
            assert tuple(ranks.tolist() for ranks in found) == expected

    def test_nan_is_never_a_hit_even_in_a_tiny_gallery(self) -> None:
        image = torch.eye(2)
        found = caption_retrieval(image, torch.full((2, 2), torch.nan), torch.arange(2))
        assert found["i2t_r10"].item() == found["t2i_r10"].item() == 0
        half_broken = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
        found = caption_retrieval(image, half_broken, torch.arange(2))
        assert found["t2i_r1"].item() == 50
        assert found["i2t_r1"].item() == 0  # the NaN caption ranks above the valid one

    def test_equal_texts_count_within_a_fold_only(self) -> None:
        image = torch.eye(2)
        caption = image.flip(0)
        text = torch.tensor([1, 1])
        assert caption_retrieval(image, caption, torch.arange(2), None, text)["t2i_r1"].item() == 100
        assert caption_retrieval(image, caption, torch.arange(2), 1, text)["t2i_medr"].item() == 1

    def test_median_is_rounded_down(self) -> None:
        # The ranks are 0 and 3. Their median 1.5 is rounded to 1, which is 2 when ranks are counted from one.
        image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        caption = torch.tensor([[0.9, 0.9], [0.1, 0.2], [0.1, 0.3], [0.1, 0.1]])
        owner = torch.tensor([0, 0, 0, 1])
        i2t, _ = caption_ranks(image, caption, owner)
        assert i2t.tolist() == [0, 3]
        assert caption_retrieval(image, caption, owner)["i2t_medr"].item() == 2
        assert caption_retrieval(image, caption, owner)["i2t_meanr"].item() == 2.5

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_compared_in_single(self, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        image, caption = torch.randn(50, 8, generator=draw).to(dtype), torch.randn(100, 8, generator=draw).to(dtype)
        owner = torch.arange(100) % 50
        with torch.autocast("cpu", torch.bfloat16):
            found = caption_ranks(image, caption, owner)
        expected = caption_ranks(image.double(), caption.double(), owner)
        assert all((a - b).abs().max() <= 1 for a, b in zip(found, expected))

    def test_folds_may_be_one_in_a_hundred_short(self) -> None:
        draw = torch.Generator().manual_seed(0)
        image = torch.nn.functional.normalize(torch.randn(299, 8, generator=draw))
        found = caption_retrieval(image, image, torch.arange(299), fold_size=100)
        assert found["i2t_r1"].item() == found["t2i_r1"].item() == 100

    def test_mistakes_name_the_argument(self) -> None:
        image, caption, owner = torch.eye(4), torch.eye(4), torch.arange(4)
        for size in (3, 8):
            with pytest.raises(ValueError, match="fold_size"):
                caption_retrieval(image, caption, owner, fold_size=size)
        for broken in (owner + 1, owner - 1):
            with pytest.raises(ValueError, match="caption_image"):
                caption_retrieval(image, caption, broken, fold_size=2)
        for captions, owners in ((caption, owner[:3]), (caption[:0], owner[:0])):
            with pytest.raises(ValueError, match="caption_image"):
                caption_retrieval(image, captions, owners)
        with pytest.raises(ValueError, match="caption_image"):
            caption_retrieval(image, caption, torch.tensor([0, 1, 0, 1]), fold_size=2)


@given(seed=st.integers(0, 1000), texts=st.sampled_from([None, 2, 5]))
def test_scores_of_all_pairs_find_what_embeddings_find(seed: int, texts: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, captions = (torch.randint(-2, 3, (n, 4), generator=generator).double() for n in (6, 11))
    owner = torch.randint(6, (11,), generator=generator)
    text = None if texts is None else torch.randint(texts, (11,), generator=generator)
    with torch.device("meta"), patch.object(retrieval, "_BLOCK", 4):
        found = score_retrieval(image @ captions.T, owner, text)
    expected = caption_retrieval(image, captions, owner, equal_text=text)
    recalls = [value for name, value in expected.items() if "_r" in name]
    assert float(found.pop("mr")) == pytest.approx(float(sum(recalls)) / 6)
    assert found == expected
