"""The losses of XMC-GAN: hinge, and the weighted contrastive losses S, W and I.

A contrastive loss compares the pairs of a batch in a matrix of similarities with the true pairs on the diagonal. Every
row and column is a classification. `XMCGANLoss` trains the networks; the functions below it are its parts and compute
in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.adversarial import hinge_discriminator, hinge_generator
from common.memory.collective import gather_with_gradient
from common.memory.groups import groups_here, shared_with, split_groups
from common.types import NonNegativeFloat, PositiveFloat, PositiveInt
from papers.xmc_gan.networks import Captions, DiscriminatorOutput, normalize

Gammas = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class Contrast(NamedTuple):
    """A contrastive loss with its accuracy and entropy.

    Attributes:
        loss: sum of the cross-entropies of rows and columns, in nats; 2 ln B at chance.
        accuracy: share of rows and columns whose largest similarity is the true pair's, in [0, 1].
        entropy: mean entropy of the softmaxes over rows and over columns, in nats.
    """

    loss: Tensor
    accuracy: Tensor
    entropy: Tensor


#: Functions that compute a network's contrastive terms, by name of the term.
Terms = Mapping[str, Callable[[], Contrast]]


class Loss(NamedTuple):
    """The loss of one network: `total` with gradient, and `logs`, the detached total and terms."""

    total: Tensor
    logs: dict[str, Tensor]


class XMCGANLoss:
    """Losses of discriminator and generator: hinge plus weighted contrastive terms. A weight of 0 disables its term.

    | weight | loss | compares | term of the discriminator | terms of the generator |
    |---|---|---|---|---|
    | `weight_sentence` | S | images and sentences | `real_sentence` | `fake_sentence` |
    | `weight_word` | W | regions and words | `real_word` | `fake_word` |
    | `weight_image_d` | I | generated and real images, features of the discriminator | | `image_d` |
    | `weight_image_net` | I | generated and real images, features of a frozen network | | `image_net` |

    Args:
        temperature: of the contrastive losses S and I.
        word_gammas: see `word_similarity`; the third is the inverse temperature of W.
        negatives_group: size of the groups whose images share negatives; null for the whole batch. A group may span
            devices.
        captions_at_once: always null: all captions are compared at once.

    Source: [5.7].
    """

    def __init__(
        self,
        weight_sentence: NonNegativeFloat = 1.0,
        weight_word: NonNegativeFloat = 1.0,
        weight_image_d: NonNegativeFloat = 1.0,
        weight_image_net: NonNegativeFloat = 1.0,
        temperature: PositiveFloat = 0.1,
        word_gammas: Gammas = (5.0, 5.0, 50.0),
        negatives_group: PositiveInt | None = None,
        captions_at_once: None = None,
    ) -> None:
        self.weights = {
            "real_sentence": weight_sentence,
            "fake_sentence": weight_sentence,
            "real_word": weight_word,
            "fake_word": weight_word,
            "image_d": weight_image_d,
            "image_net": weight_image_net,
        }
        self.temperature = temperature
        self.word_gammas = word_gammas
        self.negatives_group = negatives_group

    def discriminator(self, output: DiscriminatorOutput, captions: Captions) -> Loss:
        """Compute the discriminator's loss. `output` holds the real images first, then the generated ones.

        The contrastive terms use only the real images.
        """
        n = len(captions.length)
        terms: Terms = {
            "real_sentence": lambda: self.pairs(output.pooled[:n], output.sentence),
            "real_word": lambda: self.words(output.regions[:n], captions),  # type: ignore[index]
        }
        return self.total("discriminator", hinge_discriminator(output.logit[:n], output.logit[n:]), terms)

    def generator(self, output: DiscriminatorOutput, captions: Captions, features: Sequence[Tensor] = ()) -> Loss:
        """Compute the generator's loss. `output` holds the real images first, then the generated ones.

        `features` are the frozen network's features [B, F] of the real and of the generated images, for `image_net`.
        """
        n = len(captions.length)
        terms: Terms = {
            "fake_sentence": lambda: self.pairs(output.pooled[n:], output.sentence),
            "fake_word": lambda: self.words(output.regions[n:], captions),  # type: ignore[index]
            "image_d": lambda: self.pairs(output.pooled[n:], output.pooled[:n]),
            "image_net": lambda: self.pairs(*features),
        }
        return self.total("generator", hinge_generator(output.logit[n:]), terms)

    def pairs(self, left: Tensor, right: Tensor) -> Contrast:
        groups = zip(self.whole_groups(left.float()), self.whole_groups(right.float()))
        return mean([pair_loss(*group, self.temperature) for group in groups])

    def words(self, regions: Tensor, captions: Captions) -> Contrast:
        # Captions are smaller than images, so each rank compares its images with the captions of all ranks.
        words, length = self.whole_groups(captions.words.float()), self.whole_groups(captions.length)
        groups = zip(self.groups(regions), words, length, strict=True)
        similar = [word_similarity(*group, self.word_gammas) for group in groups]
        ranks = shared_with(len(regions), self.negatives_group)
        if ranks is not None:
            similar = [gather_with_gradient(similar[0].T, ranks).T]
        return mean([contrast(logits) for logits in similar])

    def groups(self, x: Tensor) -> list[Tensor]:
        """Split this rank's samples [B, ...] by group of negatives. If a group spans ranks, return its local part."""
        return split_groups(x, groups_here("model.loss.negatives_group", len(x), self.negatives_group))

    def whole_groups(self, x: Tensor) -> list[Tensor]:
        """Like `groups`, but return a group that spans ranks as a whole, gathered from its ranks."""
        ranks = shared_with(len(x), self.negatives_group)
        return self.groups(x) if ranks is None else [gather_with_gradient(x, ranks)]

    def total(self, network: str, hinge: Tensor, terms: Terms) -> Loss:
        """Add the weighted terms to the hinge loss; skips terms with a weight of 0."""
        total = hinge
        logs = {f"{network}_hinge": hinge.detach()}
        for name, compute in terms.items():
            if self.weights[name] > 0:
                term = compute()
                total = total + self.weights[name] * term.loss
                logs |= {f"{name}_{part}": value.detach() for part, value in term._asdict().items()}
        return Loss(total, {f"{network}_loss": total.detach(), **logs})


def mean(groups: Sequence[Contrast]) -> Contrast:
    return Contrast(*(torch.stack(values).mean() for values in zip(*groups)))


def contrast(logits: Tensor) -> Contrast:
    """Compute the cross-entropies of the rows and columns of a matrix whose diagonal has the true pairs.

    Shapes:
        logits [B, B], similarities divided by a temperature

    Source: [5.2] and [5.9].
    """
    if len(logits) < 2:
        raise ValueError(
            "a contrastive loss needs at least 2 pairs, got 1: raise data.batch_size (it is divided by the devices), "
            "or model.loss.negatives_group"
        )
    target = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    with torch.no_grad():
        both = torch.stack([logits, logits.T])
        accuracy = (both.argmax(dim=-1) == target).float().mean()
        probability = both.softmax(dim=-1)
        entropy = -(probability * torch.log(probability + 1e-8)).sum(dim=-1).mean()
    return Contrast(loss, accuracy, entropy)


def pair_loss(left: Tensor, right: Tensor, temperature: float = 0.1) -> Contrast:
    """Contrast the two vectors of each sample (image and sentence, or generated and real image) by cosine.

    Shapes:
        left, right [B, D]

    Source: [5.2] to [5.5].
    """
    with torch.autocast(left.device.type, enabled=False):
        return contrast(normalize(left.float()) @ normalize(right.float()).T / temperature)


def word_similarity(regions: Tensor, words: Tensor, length: Tensor, gammas: Gammas = (5.0, 5.0, 50.0)) -> Tensor:
    """Score every caption against every image through the regions that match its words best.

    Each word attends to an image's regions by softmax. The similarity of caption and image is a soft maximum, over
    words, of the cosine between a word and the mean of its attended regions.

    `gammas` are the sharpness of the attention, of the maximum over words, and of the result. `length` is the number of
    valid words, at least one; padding may have any values.

    Shapes:
        regions [N, R, C], words [M, T, C], length [M] -> [M, N]

    Source: [5.6] (gamma1, gamma2, gamma3).
    """
    with torch.autocast(regions.device.type, enabled=False):
        regions, words = normalize(regions.float()), normalize(words.float())
        flat = words.flatten(0, 1)
        context = (flat @ (gammas[0] * regions).transpose(1, 2)).softmax(dim=-1) @ regions
        aligned = (flat * context).sum(dim=-1) / context.norm(dim=-1).clamp(min=1e-8)
        padded = torch.arange(words.shape[1], device=words.device) >= length[:, None]
        scores = (gammas[1] * aligned).unflatten(1, words.shape[:2]).masked_fill(padded, -torch.inf)
        return gammas[2] / gammas[1] * scores.logsumexp(dim=-1).T
