"""XMC-GAN: text-to-image generation with contrastive losses.

Han Zhang, Jing Yu Koh, Jason Baldridge, Honglak Lee, Yinfei Yang: "Cross-Modal Contrastive Learning for Text-to-Image
Generation", CVPR 2021, arXiv 2101.04702.

One generator maps noise and the words of a caption to an image. One discriminator tells real from generated images and
is also the image encoder of contrastive losses between images and sentences, regions and words, and generated and real
images of the same caption. `XMCGAN.from_export` reads a trained model.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:  # importing the package alone costs nothing
    if name == "XMCGAN":
        return import_module("papers.xmc_gan.use").XMCGAN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
