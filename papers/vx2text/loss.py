"""The loss of VX2TEXT: cross-entropy of the decoder's words."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from common.memory.collective import mean_over_ranks

IGNORED = -100


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Average the cross-entropy over the valid words of all processes' batches. Return 0 without valid words.

    Answers differ in length, so the mean of the processes' means isn't the joint mean. Each process therefore divides
    by the mean number of words per process, and data parallelism averages the results to the joint mean.

    Shapes:
        logits [B, M, V]; labels [B, M], -100 for padding

    Source: [6].
    """
    total, words = per_answer(logits, labels)
    return total.sum() / mean_over_ranks(words.sum()).clamp(min=1e-9)


def per_answer(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy and the number of words of every answer, both float32 [B].

    Shapes:
        logits [B, M, V]; labels [B, M], -100 for padding
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1), (labels != IGNORED).sum(1).float()
