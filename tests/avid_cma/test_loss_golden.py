"""Compare the loss with numbers that the authors' released code produced (see golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from papers.avid_cma.loss import BankLoss

GOLDEN = Path(__file__).parents[1] / "golden" / "avid_cma"
TERMS = {"": "instance", "inst": "instance", "pos": "positive"}


def load(name: str) -> dict[str, np.ndarray]:
    """Load the arrays of a file, or of a part of the file, such as `cma/xpos`."""
    file, _, part = name.partition("/")
    with np.load(GOLDEN / f"{file}.npz", allow_pickle=False) as archive:
        return {key.removeprefix(f"{part}/"): archive[key] for key in archive.files if key.startswith(part)}


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-6, atol=5e-7)


def fill_banks(objective: BankLoss, video: np.ndarray, audio: np.ndarray) -> None:
    objective.video_bank.vectors.copy_(tensor(video))
    objective.audio_bank.vectors.copy_(tensor(audio))


def check_step(objective: BankLoss, golden: dict[str, np.ndarray], step: int) -> None:
    """Run one step on the golden inputs, and compare loss, terms, normalizer and gradients."""
    video = tensor(golden["emb_v"][step]).requires_grad_()
    audio = tensor(golden["emb_a"][step]).requires_grad_()
    out = objective(
        video, audio, tensor(golden["y"][step]), negative_index=tensor(golden["neg_idx"][step].astype(np.int64))
    )
    out["loss"].backward()
    close(out["loss"].detach(), golden["loss"][step])
    if "Z" in golden:
        close(objective.normalizer, golden["Z"][step])
    if "grad_v" in golden:
        close(video.grad, golden["grad_v"][step])
        close(audio.grad, golden["grad_a"][step])
    terms = {key for key in out if key != "loss"}
    seen = set()
    for key, values in golden.items():
        if not key.startswith("term_") or key.endswith("Modal"):
            continue
        name = key.removeprefix("term_")
        kind, _, pair = name.rpartition("-")
        name = f"{TERMS[kind]}_{pair}"
        seen.add(name)
        close(out[name], values[step])
    assert terms == seen


@pytest.mark.parametrize(("name", "cross", "within"), [("cross", 1, 0), ("self", 0, 1), ("joint", 1, 1)])
def test_avid_variants_equal_the_released_code(name: str, cross: float, within: float) -> None:
    golden = load(f"avid_{name}")
    objective = BankLoss(negatives=12, instance_cross=cross, instance_within=within).allocate(50, 16)
    fill_banks(objective, golden["bank_v_init"], golden["bank_a_init"])
    for step in range(3):
        check_step(objective, golden, step)
        close(objective.video_bank.vectors, golden["bank_v_after"][step])
        close(objective.audio_bank.vectors, golden["bank_a_after"][step])


def test_avid_at_the_paper_widths_equals_the_released_code() -> None:
    golden = load("avid_cross_k1024")
    rng = np.random.RandomState(150)
    banks = [rng.standard_normal((2000, 128)) for _ in range(2)]
    video, audio = ((bank / np.linalg.norm(bank, axis=1, keepdims=True)).astype(np.float32) for bank in banks)
    objective = BankLoss(negatives=1024).allocate(2000, 128)
    fill_banks(objective, video, audio)
    for step in range(2):
        check_step(objective, golden, step)
        rows = tensor(golden[f"bank_rows_{step}"])
        close(objective.video_bank.lookup(rows), golden[f"bank_v_rows_{step}"])
        close(objective.audio_bank.lookup(rows), golden[f"bank_a_rows_{step}"])


@pytest.mark.parametrize(
    ("name", "coefficients", "within_negatives"),
    [
        ("cma/paper", (1, 0, 0, 1), 16),
        ("cma/warm", (1, 0, 0, 1), 16),
        ("cma/xpos", (1, 0, 1, 0), 16),
        ("cma/xwpos", (1, 0, 1, 1), 16),
        ("cma/wpos3_full", (1, 0, 0, 3), None),
    ],
)
def test_cma_variants_equal_the_released_code(
    name: str, coefficients: tuple[float, float, float, float], within_negatives: int | None
) -> None:
    golden, clusters = load(name), load("cma_positives")
    objective = BankLoss(
        negatives=64,
        within_negatives=within_negatives,
        positives=8,
        instance_cross=coefficients[0],
        instance_within=coefficients[1],
        positive_cross=coefficients[2],
        positive_within=coefficients[3],
    ).allocate(500, 16)
    fill_banks(objective, clusters["bank_v"], clusters["bank_a"])
    if golden["Z_preset"] > 0:
        objective.normalizer.fill_(float(golden["Z_preset"]))
    np.testing.assert_array_equal(objective.mine(), golden["positive_set"])
    for step in range(2):
        check_step(objective, golden, step)
        rows = tensor(golden[f"bank_rows_{step}"]).long()
        close(objective.video_bank.lookup(rows), golden[f"bank_v_rows_{step}"])
        close(objective.audio_bank.lookup(rows), golden[f"bank_a_rows_{step}"])
    if "positive_set_after_refresh" in golden:
        np.testing.assert_array_equal(objective.mine(), golden["positive_set_after_refresh"])


def test_cma_takes_over_banks_and_normalizer_from_avid() -> None:
    golden = load("warm_start")
    avid = BankLoss(negatives=4).allocate(40, 8)
    fill_banks(avid, golden["bank_v"], golden["bank_a"])
    avid.normalizer.fill_(float(golden["Z"]))
    cma = BankLoss(negatives=4, within_negatives=2, positives=3, positive_within=1.0).allocate(40, 8)
    cma.load_banks(avid.state_dict())
    np.testing.assert_array_equal(cma.mine(), golden["positive_set"])
    close(cma.normalizer, golden["Z"])
    np.testing.assert_array_equal(F.normalize(cma.video_bank.vectors), F.normalize(tensor(golden["bank_v"])))
