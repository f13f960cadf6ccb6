"""R-precision: how often a generated image is closer to its text than to random texts of other images.

Source: T. Xu et al., "AttnGAN: Fine-Grained Text to Image Generation with Attentional Generative Adversarial
Networks"; docs/papers/xmc_gan.md [9.2].
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.metrics.gathering import RowsOncePerSample

# Bounds the memory of a block of queries: its random keys, and the values of its candidates.
_SCORES = 1 << 24


def first_ranked(
    image: Tensor, text: Tensor, identity: Tensor | None = None, candidates: int = 100, seed: int = 0
) -> Tensor:
    """Return whether each image is closer to its text than to random texts of other images, bool [N].

    Compares inner products. Ties and NaN are misses, so a collapsed encoder scores 0.

    Args:
        image, text: embeddings [N, d] of the generated images and of their texts.
        identity: number of each text [N], the same for equal texts, which are never compared. None: all texts differ.
        candidates: number of texts to compare an image with, including its own text. Limited to the number of texts.
        seed: seed for drawing the other texts, without replacement.
    """
    count = len(image)
    identity = torch.arange(count) if identity is None else identity.cpu()
    generator = torch.Generator().manual_seed(seed)
    block = max(_SCORES // max(count, min(candidates, count) * image.shape[1]), 1)
    hits = []
    for start in range(0, count, block):
        rows = torch.arange(start, min(start + block, count))
        keys = torch.rand(len(rows), count, generator=generator)
        keys[identity[rows, None] == identity[None]] = 2.0
        drawn, others = keys.topk(min(candidates - 1, count), largest=False)
        valid = (drawn < 1.5).to(image.device)
        if not bool(valid.any(1).all()):
            raise ValueError("R-precision needs different texts, but all images have the same one")
        # The true text is scored in the same product as the others; a separate product would round differently.
        compared = torch.cat([rows[:, None], others], dim=1).to(text.device)
        scores = (image[start : start + block, None] * text[compared]).sum(-1)
        hits.append(((scores[:, 1:] < scores[:, :1]) | ~valid).all(1))
    return torch.cat(hits)


def r_precision(
    image: Tensor,
    text: Tensor,
    identity: Tensor | None = None,
    candidates: int = 100,
    folds: int = 10,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute R-precision by cosine in percent: mean and standard deviation (divisor n) over shuffled folds.

    Examples:
        >>> r_precision(image=torch.eye(20), text=torch.eye(20), candidates=10, folds=2)
        (100.0, 0.0)
    """
    hits = first_ranked(F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1), identity, candidates, seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(hits)))
    shares = torch.stack([100 * hits.cpu()[part].double().mean() for part in order.tensor_split(folds)])
    return float(shares.mean()), float(shares.std(correction=0))


class RPrecision:
    def __init__(self, candidates: int = 100, folds: int = 10, seed: int = 0) -> None:
        self.candidates = candidates
        self.folds = folds
        self.seed = seed
        self._rows = RowsOncePerSample("image", "text", "identity")

    def update(self, index: Tensor, image: Tensor, text: Tensor, identity: Tensor) -> None:
        """Add samples [B] with embeddings [B, d]. `identity` int64 [B] is the same for equal texts on all processes."""
        self._rows.update(index, image=image.float(), text=text.float(), identity=identity)

    def compute(self, device: torch.device | str = "cpu") -> tuple[float, float]:
        """Return the mean and standard deviation over the folds, the same on every process."""
        _, rows = self._rows.compute(device)
        folds = min(self.folds, len(rows["image"]))
        return r_precision(rows["image"], rows["text"], rows["identity"], self.candidates, folds, self.seed)
