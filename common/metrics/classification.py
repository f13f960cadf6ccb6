"""Accuracy of classifiers."""

import torch
from torch import Tensor


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Count other classes that score at least as high as the label: scores [..., C], labels [...] -> int64 [...].

    Ties and NaN count against the classifier, so a constant classifier is never right.
    """
    own = scores.gather(-1, labels.unsqueeze(-1))
    return (~(scores < own)).sum(-1) - 1


def hits(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Return 1.0 if the label is among the `k` highest scores, else 0.0: scores [..., C], labels [...] -> [...].

    Examples:
        >>> hits(scores=torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]), labels=torch.tensor([1, 2]))
        tensor([1., 0.])
    """
    return (label_ranks(scores, labels) < k).float()


def mean_clip_probability(clip_logits: Tensor) -> Tensor:
    """Average the clips' softmax probabilities: [..., clips, C] -> [..., C]; docs/papers/avid_cma.md [10.1].

    Examples:
        >>> mean_clip_probability(torch.zeros(5, 10, 101)).shape  # 5 videos of 10 clips
        torch.Size([5, 101])
    """
    return torch.softmax(clip_logits.float(), dim=-1).mean(-2)
