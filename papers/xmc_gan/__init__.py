"""XMC-GAN: text-to-image generation with contrastive losses.

Han Zhang, Jing Yu Koh, Jason Baldridge, Honglak Lee, Yinfei Yang: "Cross-Modal Contrastive Learning for Text-to-Image
Generation", CVPR 2021, arXiv 2101.04702.

A generator maps noise and the words of a caption to an image. A discriminator distinguishes real from generated images.
It is also the image encoder for the contrastive losses between images and sentences, regions and words, and generated
and real images of the same caption. `XMCGAN.from_export` loads a trained model.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:  # keeps `import papers.xmc_gan` cheap
    if name == "XMCGAN":
        return import_module("papers.xmc_gan.use").XMCGAN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
