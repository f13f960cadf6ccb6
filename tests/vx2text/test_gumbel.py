"""Compare the differentiable tokens with numbers derived from the poster's formula, and test their properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from papers.vx2text.gumbel import choose, gumbel_noise

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vx2text" / "gumbel_tokenizer.json").read_text())
MODES = {
    "soft_independent": "soft",
    "st_independent": "st_independent",
    "st_topk": "st_topk",
    "st_topk_selected": "st_topk_selected",
    "eval_topk": "st_topk",
}


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["id"]))
def test_golden_values_and_gradients(case: dict[str, Any], mode: str) -> None:
    expected = case["outputs"][mode]
    logits, table = tensor(case["logits"]).requires_grad_(), tensor(case["table"]).requires_grad_()
    noise = None if mode == "eval_topk" else tensor(case["gumbel_noise"])
    tokens, chosen = choose(logits, table, case["K"], MODES[mode], case["tau"], noise)  # type: ignore[arg-type]
    torch.testing.assert_close(tokens, tensor(expected["tokens"]), atol=3e-12, rtol=0)
    if "indices" in expected and expected["indices"] is not None:
        assert chosen.tolist() == expected["indices"]
    if mode in ("st_independent", "st_topk", "eval_topk"):
        assert torch.equal(tokens, table[chosen])  # bit for bit
    tokens.backward(tensor(case["upstream"]))
    gradient = torch.zeros_like(logits) if logits.grad is None else logits.grad
    torch.testing.assert_close(gradient, tensor(expected["grad_logits"]), atol=3e-12, rtol=0)
    if "grad_table" in expected and expected["grad_table"] is not None:
        torch.testing.assert_close(table.grad, tensor(expected["grad_table"]), atol=3e-12, rtol=0)


def test_draws_follow_the_probabilities() -> None:
    check = GOLDEN["meta"]["sampling_check"]
    probability = torch.tensor(check["p"])
    draws = 40_000
    noise = gumbel_noise(draws, 1, 4, generator=torch.Generator().manual_seed(0))
    _, chosen = choose(probability.log().expand(draws, 4), torch.eye(4), 2, "st_topk", 1.0, noise)
    first = torch.bincount(chosen[:, 0], minlength=4) / draws
    torch.testing.assert_close(first, probability, atol=0.012, rtol=0)
    for pair, share in check["ordered_pair_without_replacement"].items():
        a, b = map(int, pair)
        measured = ((chosen[:, 0] == a) & (chosen[:, 1] == b)).float().mean().item()
        assert measured == pytest.approx(share, abs=0.012), pair


def test_ties_go_to_the_lower_category() -> None:
    assert choose(torch.zeros(1, 6), torch.eye(6), 3)[1].tolist() == [[0, 1, 2]]


def test_half_precision_is_computed_in_float32() -> None:
    logits = (torch.randn(3, 8) * 20).bfloat16()
    table = torch.randn(8, 4)
    noise = gumbel_noise(3, 1, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, _ = choose(logits, table, 2, "st_topk", 1.0, noise)
    assert tokens.dtype == torch.float32


def test_noise_is_finite_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, 1.0]))
    assert torch.isfinite(gumbel_noise(2)).all()
