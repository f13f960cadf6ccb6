"""The differentiable tokeniser: from the scores of a classifier to a few word-like tokens, with a gradient.

A modality's classifier says how probable each category is; the most probable ones, perturbed by Gumbel noise in
training, become tokens. Choosing is not differentiable, so the gradient is that of the softmax of the perturbed
log-probabilities.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Estimator = Literal["st_topk", "st_independent", "soft", "st_topk_selected"]

# Uniform numbers are kept inside (0, 1): the logarithm of the noise must stay finite in float32.
_SMALLEST, _LARGEST = 1e-9, 1 - 1e-7


def gumbel_noise(*shape: int, generator: torch.Generator | None = None, device: torch.device | None = None) -> Tensor:
    """Standard Gumbel noise in float32.

    Args:
        shape: of the result.
        generator: source of the numbers; the global one by default.
        device: where the result lies.

    Source: specification 4.
    """
    uniform = torch.rand(*shape, generator=generator, device=device).clamp(_SMALLEST, _LARGEST)
    return -torch.log(-torch.log(uniform))


def choose(
    logits: Tensor,
    table: Tensor,
    tokens: int,
    estimator: Estimator = "st_topk",
    temperature: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn the scores of categories into embeddings of a few of them.

    | estimator | value | gradient to the scores |
    |---|---|---|
    | `st_topk`, the method | rows of the K largest perturbed values of draw 0 | each through the one softmax |
    | `st_independent` | row of the largest of draw k | through the softmax of draw k |
    | `soft` | softmax of draw k times the table | through that softmax |
    | `st_topk_selected` | as `st_topk` | of the chosen category's probability alone; for comparison, it learns worse |

    Without noise the K most probable categories are chosen and the scores get no gradient: the evaluation, and the
    frozen tokeniser. Of equal scores the lower category comes first. Computed in float32 at least, also under autocast.

    Args:
        logits: scores of the categories before the softmax.
        table: embedding of every category.
        tokens: how many are chosen, K.
        estimator: see above.
        temperature: tau, by which perturbed log-probabilities are divided.
        noise: Gumbel noise; None in evaluation.

    Shapes:
        logits [B, C]; table [C, D]; noise [B, K, C], or [B, 1, C] for `st_topk` -> tokens [B, K, D], categories [B, K]

    Raises:
        ValueError: more tokens than categories, an unknown estimator, or noise of another shape.

    Source: specification 4.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
    categories = logits.shape[1]
    if not 1 <= tokens <= categories:
        raise ValueError(f"{tokens} tokens cannot be chosen from {categories} categories")
    with torch.autocast(logits.device.type, enabled=False):
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_probability = F.log_softmax(logits.to(wide), dim=1)
        if noise is None:
            chosen = _largest(log_probability.detach(), tokens)
            return F.embedding(chosen, table), chosen
        draws = 1 if estimator.startswith("st_topk") else tokens
        if noise.shape not in {(len(logits), draws, categories), (len(logits), tokens, categories)}:
            raise ValueError(
                f"noise must be [{len(logits)}, {draws}, {categories}] for {estimator}, got {list(noise.shape)}"
            )
        perturbed = (log_probability[:, None] + noise[:, :draws].to(wide)) / temperature
        relaxed = perturbed.softmax(dim=2)
        values = table.to(wide)
        if estimator == "soft":
            return relaxed @ values, relaxed.detach().argmax(dim=2)
        if estimator == "st_independent":
            chosen = torch.cat([_largest(draw, 1) for draw in perturbed.detach().unbind(1)], dim=1)
        else:
            chosen = _largest(perturbed.detach()[:, 0], tokens)
        rows = F.embedding(chosen, values)
        if estimator == "st_topk_selected":
            own = relaxed[:, 0].gather(1, chosen)[:, :, None]
            return rows * (1 + own - own.detach()), chosen
        # The value is that of the rows alone, to the bit; adding and subtracting the relaxed vector would round it.
        soft = relaxed @ values.detach()
        return rows + (soft - soft.detach()), chosen


def _largest(scores: Tensor, count: int) -> Tensor:
    """Positions [B, count] of the largest scores [B, C], the lower one first where they tie."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


class DifferentiableTokeniser(nn.Module):
    """Categories of one modality as tokens of the language model's width.

    Args:
        table: first embedding of every category [C, D], trained from there as a parameter of its own; None where every
            call brings one.
        tokens: tokens per clip, K.
        estimator: of the gradient; see `choose`.
        temperature: tau.

    Source: specification 4.
    """

    table: nn.Parameter | None

    def __init__(
        self,
        table: Tensor | None,
        tokens: int,
        estimator: Estimator = "st_topk",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if tokens < 1 or (table is not None and tokens > len(table)):
            raise ValueError(
                f"{tokens} tokens cannot be chosen from {'any number of' if table is None else len(table)} categories"
            )
        self.tokens = tokens
        self.estimator: Estimator = estimator
        self.temperature = temperature
        self.table = None if table is None else nn.Parameter(table.detach().clone())

    @property
    def draws(self) -> int:
        """Draws of noise per sample."""
        return 1 if self.estimator.startswith("st_topk") else self.tokens

    def forward(
        self, logits: Tensor, noise: Tensor | None = None, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, K, D] and their categories [B, K] of scores [B, C]; without noise the most probable categories."""
        rows = self.table if table is None else table
        if rows is None:
            raise ValueError("a tokeniser without a table of its own needs one at every call")
        return choose(logits, rows, self.tokens, self.estimator, self.temperature, noise)
