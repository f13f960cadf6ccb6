"""Compare the mining of positives with the released code's sets and with brute force, and test its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from papers.avid_cma.mining import mine_positives
from tests.avid_cma.test_loss_golden import load, tensor

AGREEMENTS = ["consensus", "union", "video", "audio"]


def banks(num_items: int, dim: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video, audio = (F.normalize(torch.randn(num_items, dim, generator=generator), dim=1) for _ in range(2))
    return video, audio


def brute_force(video: torch.Tensor, audio: torch.Tensor, k: int, agreement: str) -> torch.Tensor:
    similarity_v, similarity_a = video @ video.T, audio @ audio.T
    scores = {
        "consensus": torch.minimum(similarity_v, similarity_a),
        "union": torch.maximum(similarity_v, similarity_a),
        "video": similarity_v,
        "audio": similarity_a,
    }[agreement]
    scores.fill_diagonal_(-torch.inf)
    return scores.topk(k, dim=1).indices.sort(dim=1).values.int()


@pytest.mark.parametrize(
    ("agreement", "k"), [("consensus", 8), ("consensus", 32), ("union", 8), ("video", 8), ("audio", 8)]
)
def test_mined_sets_equal_the_released_code(agreement: str, k: int) -> None:
    golden = load("cma_positives")
    mined = mine_positives(tensor(golden["bank_v"]), tensor(golden["bank_a"]), k, agreement)  # type: ignore[arg-type]
    np.testing.assert_array_equal(mined, golden[f"positive_set_{agreement}_k{k}"])
    assert mined.dtype == torch.int32


@given(
    num_items=st.integers(2, 120),
    share=st.floats(0, 1),
    agreement=st.sampled_from(AGREEMENTS),
    rows=st.integers(1, 150),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50)
def test_search_equals_brute_force(num_items: int, share: float, agreement: str, rows: int, seed: int) -> None:
    k = 1 + int(share * (num_items - 2))
    video, audio = banks(num_items, dim=24, seed=seed)
    mined = mine_positives(video, audio, k, agreement, rows)  # type: ignore[arg-type]
    assert torch.equal(mined, brute_force(video, audio, k, agreement))
    assert (mined[:, 1:] > mined[:, :-1]).all()


def test_equal_rows_never_make_an_item_its_own_positive() -> None:
    row = F.normalize(torch.ones(1, 4), dim=1).expand(50, 4).contiguous()
    mined = mine_positives(row, row, 7, rows=8)
    assert not (mined == torch.arange(50)[:, None]).any()
    assert (mined[:, 1:] > mined[:, :-1]).all()
    assert torch.equal(mined, mine_positives(row, row, 7, rows=9))
