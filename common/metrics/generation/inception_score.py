"""Inception score: how sure a classifier is of each image, and how different the images are.

Source: T. Salimans et al., "Improved Techniques for Training GANs".
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.metrics.gathering import Seen, gather_objects


def _score(count: Tensor, entropy: Tensor, total: Tensor) -> Tensor:
    """Compute the score of `count` rows p [C]. `entropy` is the sum of p log p, `total` [C] the sum of p."""
    mean = total / count
    # Sum p (log p - log mean) over classes and images; a class that no image has adds 0.
    return ((entropy - torch.special.xlogy(total, mean).sum()) / count).exp()


class InceptionScore:
    """`exp` of the mean KL divergence between an image's class probabilities and the mean over images, from 1 to C.

    Adds up all batches and processes in float64. With several `splits`, `total` images are divided into consecutive
    parts, which are scored separately. If the number isn't divisible, the first parts have one more image.

    Examples:
        >>> score = InceptionScore()
        >>> score.update(index=torch.arange(4), probabilities=torch.eye(4))
        >>> score.compute()
        (4.0, 0.0)
    """

    def __init__(self, splits: int = 1, total: int | None = None) -> None:
        if splits > 1 and (total is None or total < splits):
            raise ValueError(f"evaluation.splits: {splits} parts need at least {splits} samples, got {total}")
        self.splits = splits
        self.total = total
        self._seen = Seen()
        # For every part: the number of samples, the sum of p log p, and the sums of p.
        self._sums: Tensor | None = None

    def update(self, index: Tensor, probabilities: Tensor) -> None:
        """Add samples [B] with class probabilities [B, C]. Skip samples that were added before."""
        chosen = self._seen.fresh(index).to(probabilities.device)
        rows = probabilities.detach()[chosen].double()
        if self._sums is None:
            self._sums = rows.new_zeros(self.splits, 2 + rows.shape[1])
        entropy = torch.special.xlogy(rows, rows).sum(1, keepdim=True)
        self._sums.index_add_(
            0, self._part(index.to(rows.device)[chosen]), torch.cat([torch.ones_like(entropy), entropy, rows], 1)
        )

    def _part(self, index: Tensor) -> Tensor:
        if self.splits == 1:
            return torch.zeros_like(index)
        assert self.total is not None
        # Like tensor_split: the first `longer` parts have one more sample.
        size, longer = divmod(self.total, self.splits)
        border = longer * (size + 1)
        return torch.where(index < border, index // (size + 1), longer + (index - border) // size)

    def compute(self) -> tuple[float, float]:
        """Return the mean and standard deviation (divisor n) over the parts, the same on every process."""
        self._seen.require_disjoint()
        known = gather_objects([] if self._sums is None else [self._sums.cpu()])
        sums = torch.stack(known).sum(0) if known else torch.zeros(self.splits, 2)
        if not bool((sums[:, 0] > 0).all()):
            raise ValueError("the inception score needs an image in each of its parts")
        scores = torch.stack([_score(part[0], part[1], part[2:]) for part in sums])
        return float(scores.mean()), float(scores.std(correction=0))
