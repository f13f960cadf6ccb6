"""Differentiable word tokens: turn a classifier's scores into the embeddings of a few categories.

The most probable categories, perturbed by Gumbel noise in training, become tokens. This choice has no gradient, so the
backward pass uses that of the softmax of the perturbed log-probabilities.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Estimator = Literal["st_topk", "st_independent", "soft", "st_topk_selected"]


def gumbel_noise(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard Gumbel noise in float32 ([4])."""
    # Stay inside (0, 1), so that the noise is finite.
    uniform = torch.rand(*shape, generator=generator).clamp(1e-9, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


def draws_of(estimator: Estimator, tokens: int) -> int:
    """Return how many noise vectors a clip needs: one for all of its tokens, or one per token."""
    return 1 if estimator.startswith("st_topk") else tokens


def choose(
    logits: Tensor,
    table: Tensor,
    tokens: int,
    estimator: Estimator = "st_topk",
    temperature: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn the scores of all categories into embeddings of the chosen categories.

    | estimator | value | gradient to the scores |
    |---|---|---|
    | `st_topk`, the method | rows with the K largest perturbed values of draw 0 | through the softmax of draw 0 |
    | `st_independent` | row with the largest value of draw k | through the softmax of draw k |
    | `soft` | softmax of draw k times the table | through that softmax |
    | `st_topk_selected` | as `st_topk` | only through the chosen category's probability; learns worse |

    Without noise (in evaluation or with a frozen classifier), choose the K most probable categories and give the scores
    no gradient. The category with the lower index wins ties. Compute in at least float32, even under autocast.

    Args:
        logits: scores [B, C] before the softmax.
        table: embeddings [C, D].
        tokens: K.
        temperature: tau, which divides perturbed log-probabilities.
        noise: Gumbel noise [B, K, C], or [B, 1, C] for `st_topk`; None in evaluation.

    Returns:
        Embeddings [B, K, D] and categories [B, K].

    Source: [4].
    """
    with torch.autocast(logits.device.type, enabled=False):
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_probability = F.log_softmax(logits.to(wide), dim=1)
        if noise is None:
            chosen = largest(log_probability.detach(), tokens)
            return F.embedding(chosen, table), chosen
        values = table.to(wide)
        noise = noise[:, : draws_of(estimator, tokens)].to(wide)
        perturbed = (log_probability[:, None] + noise) / temperature  # [B, draws, C]
        relaxed = perturbed.softmax(dim=2)
        if estimator == "soft":
            return relaxed @ values, relaxed.detach().argmax(dim=2)
        scores = perturbed.detach()
        chosen = largest(scores, 1)[:, :, 0] if estimator == "st_independent" else largest(scores[:, 0], tokens)
        rows = F.embedding(chosen, values)
        if estimator == "st_topk_selected":
            probability = relaxed[:, 0].gather(1, chosen)[:, :, None]
            return rows * (1 + probability - probability.detach()), chosen
        # Adds exactly zero, so the value is that of the rows; `rows + soft - soft` would round it.
        soft = relaxed @ values.detach()
        return rows + (soft - soft.detach()), chosen


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the positions [..., count] of the largest scores [..., C]. The lower position wins ties."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
