"""Losses between a generator and a discriminator."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a discriminator, at least 0: pushes real scores above 1 and fake scores below -1.

    Shapes:
        real [...], fake [...], whose shapes may differ -> scalar

    Examples:
        >>> hinge_discriminator(real=torch.tensor([2.0, 0.5]), fake=torch.tensor([-2.0, 0.0]))
        tensor(0.7500)

    Source: Lim and Ye, "Geometric GAN"; docs/papers/xmc_gan.md [5.1].
    """
    return F.relu(1.0 - at_least_float32(real)).mean() + F.relu(1.0 + at_least_float32(fake)).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """Loss of a generator against a hinge discriminator: the negative mean score of generated images.

    Examples:
        >>> hinge_generator(fake=torch.tensor([-2.0, 0.5]))
        tensor(0.7500)

    Source: Lim and Ye, "Geometric GAN"; docs/papers/xmc_gan.md [5.1].
    """
    return -at_least_float32(fake).mean()
