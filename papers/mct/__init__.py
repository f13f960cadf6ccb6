"""MCT: multimodal contrastive training for visual representation learning.

Xin Yuan, Zhe Lin, Jason Kuen, Jianming Zhang, Yilin Wang, Michael Maire, Ajinkya Kale, Baldo Faieta: "Multimodal
Contrastive Training for Visual Representation Learning", CVPR 2021, arXiv 2104.12836.

An image encoder and a text encoder are trained on images with captions and, optionally, tags. Within each modality, a
view must find, in a queue, the momentum key of another view of the same item, or keys of items that share its tags.
Across modalities, an image must be closer to its caption, and a caption to its image, than to all keys of a queue by a
margin. Both kinds of losses share the encoders but not the projection heads. The image encoder is evaluated by linear
probes, detection, and cross-modal search. The method is covered by US patent 12,223,439.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:  # keeps `import papers.mct` cheap
    if name == "MCT":
        return import_module("papers.mct.use").MCT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
