"""Caption retrieval against the official code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.metrics.retrieval import caption_ranks, caption_retrieval

GOLDEN = Path(__file__).parents[1] / "golden" / "mct" / "retrieval.npz"
NAMES = [f"{direction}_{name}" for direction in ("i2t", "t2i") for name in ("r1", "r5", "r10", "medr", "meanr")]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file}


@pytest.fixture(scope="module")
def owners() -> Tensor:
    return torch.arange(300) // 5


@pytest.mark.parametrize("max_scores", [1, 7000, 1 << 22])
def test_ranks(golden: dict[str, Tensor], owners: Tensor, max_scores: int) -> None:
    i2t, t2i = caption_ranks(golden["image_emb"], golden["caption_emb"], owners, max_scores=max_scores)
    assert torch.equal(i2t, golden["i2t_ranks"])
    assert torch.equal(t2i, golden["t2i_ranks"])


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


def test_order_of_captions_does_not_matter(golden: dict[str, Tensor], owners: Tensor) -> None:
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    whole = caption_retrieval(golden["image_emb"], golden["caption_emb"], owners, fold_size=20)
    mixed = caption_retrieval(golden["image_emb"], golden["caption_emb"][order], owners[order], fold_size=20)
    assert mixed == whole


def test_single_precision(golden: dict[str, Tensor], owners: Tensor) -> None:
    i2t, t2i = caption_ranks(golden["image_emb"].float(), golden["caption_emb"].float(), owners)
    assert torch.equal(i2t, golden["i2t_ranks"])
    assert torch.equal(t2i, golden["t2i_ranks"])
