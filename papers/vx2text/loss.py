"""The losses of VX2TEXT: of the decoder's words and of a classifier's categories."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from common.memory.collective import is_distributed, mean_over_ranks, world_size

IGNORED = -100


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the valid words of the joint batch of all processes; 0 without valid words.

    Answers differ in length, so the mean over processes isn't the joint mean. Each process therefore divides by the
    mean number of words per process; data parallelism then averages to the joint mean.

    Shapes:
        logits [B, M, V]; labels [B, M], -100 for padding

    Source: [6].
    """
    total, words = per_answer(logits, labels)
    count = words.sum()
    if is_distributed():
        dist.all_reduce(count)
        return total.sum() * world_size() / count.clamp(min=1.0)
    return total.sum() / count.clamp(min=1.0)


def per_answer(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and number of words of every answer, both float32 [B].

    Shapes:
        logits [B, M, V]; labels [B, M], -100 for padding
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1), (labels != IGNORED).sum(1).float()


def words_loss(logits: Tensor, words: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of a classifier against a uniform distribution over the true words, with label smoothing.

    The mean over rows with a true word; with several processes, this process's part of the joint mean.

    Shapes:
        logits, words [B, C]

    Source: [14], step 1.
    """
    target = words.to(torch.float32)
    number = target.sum(1)
    target = (1.0 - smoothing) * target / number.clamp(min=1.0)[:, None] + smoothing / target.shape[1]
    losses = -(F.log_softmax(logits.float(), dim=1) * target).sum(1) * (number > 0)
    rows = mean_over_ranks((number > 0).sum().float())
    return losses.sum() / (rows + (rows == 0))
