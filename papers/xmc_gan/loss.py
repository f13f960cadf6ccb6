"""The contrastive losses of XMC-GAN as pure functions, in float32 whatever the precision of their inputs.

All three compare the pairs of a batch: what belongs together stands on the diagonal of a matrix of similarities, and
every row and every column is a classification of its own entry against all others.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.memory.collective import gather_with_gradient

#: Which pairs are negatives: those of the device's batch, or those of all devices.
Negatives = Literal["local", "global"]


def normalise(x: Tensor) -> Tensor:
    """x divided by its length along the last dimension; a vector of zeros stays zero, also in its gradient.

    Source: specification 3.4.
    """
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True).clamp(min=1e-12))


class Matching(NamedTuple):
    """A contrastive loss and how well the pairs are told apart.

    Attributes:
        loss: sum of the cross entropies of rows and columns, in nats; 2 ln B at chance.
        accuracy: share of the pairs that are the largest of their row, or column, averaged over both [0, 1].
        entropy: of the distributions over a row, or column, averaged over both, in nats.
    """

    loss: Tensor
    accuracy: Tensor
    entropy: Tensor


def matching(logits: Tensor) -> Matching:
    """Cross entropies of the rows and of the columns of a matrix whose diagonal holds the pairs.

    Args:
        logits: similarities, already divided by a temperature.

    Shapes:
        logits [B, B]

    Raises:
        ValueError: B is 1, so that there is nothing to tell apart.

    Source: specification 5.2 and 5.9.
    """
    if len(logits) < 2:
        raise ValueError(
            "a contrastive loss needs at least 2 pairs, got 1: raise data.batch_size (it is divided by the devices), "
            "or set model.negatives to global"
        )
    target = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    with torch.no_grad():
        both = torch.stack([logits, logits.T])
        accuracy = (both.argmax(dim=-1) == target).float().mean()
        probability = both.softmax(dim=-1)
        entropy = -(probability * torch.log(probability + 1e-8)).sum(dim=-1).mean()
    return Matching(loss, accuracy, entropy)


def pair_loss(
    left: Tensor,
    right: Tensor,
    temperature: float = 0.1,
    l2_normalise: bool = True,
    negatives: Negatives = "local",
) -> Matching:
    """Contrast of two vectors of every sample: image and sentence, or generated and real image.

    Args:
        left, right: one row for each sample.
        temperature: the cosines are divided by it.
        l2_normalise: compare directions alone.
        negatives: see `Negatives`; with `global` every rank returns the loss of the joint batch.

    Shapes:
        left, right [B, D]

    Raises:
        ValueError: a batch of one.

    Source: specification 5.2 to 5.5.
    """
    with torch.autocast(left.device.type, enabled=False):
        left, right = left.float(), right.float()
        if l2_normalise:
            left, right = normalise(left), normalise(right)
        if negatives == "global":
            left, right = gather_with_gradient(left), gather_with_gradient(right)
        return matching(left @ right.T / temperature)


def word_similarity(
    regions: Tensor,
    words: Tensor,
    length: Tensor,
    gammas: tuple[float, float, float] = (5.0, 5.0, 50.0),
    captions_at_once: int | None = None,
) -> Tensor:
    """Similarity of every caption to every image through the best matching regions of its words.

    Each word gathers the regions of an image that resemble it, by a softmax over the regions; the similarity is a soft
    maximum, over the words, of the cosine between a word and what it gathered.

    Args:
        regions: features of the places of N images.
        words: vectors of the words of M captions, padded with anything, zeros as well.
        length: number of words that count, at least one.
        gammas: sharpness of the attention, of the maximum over words, and of the result.
        captions_at_once: so many captions are compared at once, for memory; null for all.

    Shapes:
        regions [N, R, C], words [M, T, C], length [M] -> [M, N]

    Source: specification 5.6 (gamma1, gamma2, gamma3).
    """
    with torch.autocast(regions.device.type, enabled=False):
        regions, words = normalise(regions.float()), normalise(words.float())
        size = captions_at_once or len(words)
        parts = [
            _word_similarity(regions, some, count, gammas) for some, count in zip(words.split(size), length.split(size))
        ]
        return torch.cat(parts)


def _word_similarity(regions: Tensor, words: Tensor, length: Tensor, gammas: tuple[float, float, float]) -> Tensor:
    """`word_similarity` of normalised regions and words."""
    flat = words.flatten(0, 1)
    attention = (flat @ (gammas[0] * regions).transpose(1, 2)).softmax(dim=-1)
    context = attention @ regions
    aligned = (flat * context).sum(dim=-1) / context.norm(dim=-1).clamp(min=1e-8)
    padded = torch.arange(words.shape[1], device=words.device) >= length[:, None]
    scores = (gammas[1] * aligned).unflatten(1, words.shape[:2]).masked_fill(padded, -torch.inf)
    return gammas[2] / gammas[1] * scores.logsumexp(dim=-1).T


def word_loss(
    regions: Tensor,
    words: Tensor,
    length: Tensor,
    gammas: tuple[float, float, float] = (5.0, 5.0, 50.0),
    negatives: Negatives = "local",
    captions_at_once: int | None = None,
) -> Matching:
    """Contrast of captions and images by `word_similarity`.

    Args:
        regions, words, length, gammas, captions_at_once: see `word_similarity`; one caption for each image.
        negatives: see `Negatives`; with `global` each rank compares its own captions with the images of all, and
            returns the loss of the joint batch.

    Shapes:
        regions [B, R, C], words [B, T, C], length [B]

    Raises:
        ValueError: a batch of one.

    Source: specification 5.6.
    """
    if negatives == "global":
        own = word_similarity(gather_with_gradient(regions.float()), words, length, gammas, captions_at_once)
        return matching(gather_with_gradient(own))
    return matching(word_similarity(regions, words, length, gammas, captions_at_once))
