"""XMC-GAN: text-to-image generation held together by contrastive losses.

Han Zhang, Jing Yu Koh, Jason Baldridge, Honglak Lee, Yinfei Yang: "Cross-Modal Contrastive Learning for Text-to-Image
Generation", CVPR 2021, arXiv 2101.04702.

One generator maps noise and the words of a caption to an image; one discriminator tells real from generated images and
serves at the same time as the image encoder of contrastive losses between images and sentences, regions and words, and
generated and real images of the same caption.

``XMCGAN.from_export`` loads a trained model. What trains one lives in ``module`` (XMCGAN), ``model``, ``objective``,
``data``, ``text``, ``evaluation`` and ``checkpoints``; import them from there, so that importing this package costs
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from papers.xmc_gan.use import XMCGAN

__all__ = ["XMCGAN"]


def __getattr__(name: str) -> Any:
    if name != "XMCGAN":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from papers.xmc_gan.use import XMCGAN

    return XMCGAN
