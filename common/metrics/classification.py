"""Accuracy of classifiers."""

import torch
from torch import Tensor


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many other classes score at least as high as the true one: scores [..., C] and labels [...] -> int64 [...].

    Ties and NaN count against the classifier, so one with the same score for every class is never right.
    """
    own = scores.gather(-1, labels.unsqueeze(-1))
    return (~(scores < own)).sum(-1) - 1


def hits(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the true class is among the `k` highest: scores [..., C] and labels [...] -> 0.0 or 1.0, [...].

    Examples:
        >>> hits(scores=torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]), labels=torch.tensor([1, 2]))
        tensor([1., 0.])
    """
    return (label_ranks(scores, labels) < k).float()


def mean_clip_probability(clip_logits: Tensor) -> Tensor:
    """Mean over clips of the softmax of each: [..., clips, C] -> [..., C]; docs/papers/avid_cma.md [10.1].

    Examples:
        >>> mean_clip_probability(torch.zeros(5, 10, 101)).shape  # 5 videos of 10 clips
        torch.Size([5, 101])
    """
    return torch.softmax(clip_logits.float(), dim=-1).mean(-2)
