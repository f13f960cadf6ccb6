"""Accuracy of classifiers."""

import torch
from torch import Tensor


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many other classes score at least as high as the true one.

    Ties and NaN count against the classifier, so that one which gives every class the same score, or none, is right
    about nothing.

    Args:
        scores: [..., C].
        labels: True classes [...].

    Returns:
        [...] int64; 0 when the true class alone scores highest.
    """
    own = scores.gather(-1, labels.unsqueeze(-1))
    return (~(scores < own)).sum(-1) - 1


def hits(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the true class is among the `k` highest, as 0.0 or 1.0.

    Args:
        scores: [..., C].
        labels: True classes [...].

    Returns:
        [...] float32.
    """
    return (label_ranks(scores, labels) < k).float()


def mean_clip_probability(clip_logits: Tensor) -> Tensor:
    """Class probabilities of a sample that is seen as several clips.

    Args:
        clip_logits: [..., clips, C].

    Returns:
        The mean over clips of the softmax of each, [..., C] in float32.

    Source: docs/papers/avid_cma.md [10.1].
    """
    return torch.softmax(clip_logits.float(), dim=-1).mean(-2)
