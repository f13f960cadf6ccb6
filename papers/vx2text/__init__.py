"""VX2TEXT: text generated from video, sound and speech through differentiable word-like tokens.

Xudong Lin, Gedas Bertasius, Jue Wang, Shih-Fu Chang, Devi Parikh, Lorenzo Torresani: "VX2TEXT: End-to-End Learning of
Video-Based Text Generation From Multimodal Inputs", CVPR 2021, arXiv 2101.12059.

Video and sound go through classifiers, and the names of the most probable categories become tokens beside the words of
speech, history and question; a text encoder-decoder reads them all and writes the answer or the caption. Choosing
categories is made differentiable by a Gumbel-softmax relaxation, so the classifiers learn from the text that is wanted.
"""

from typing import Any

__all__ = ["VX2Text"]


def __getattr__(name: str) -> Any:
    """The model, imported when it is asked for: importing the package costs nothing."""
    if name != "VX2Text":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from papers.vx2text.use import VX2Text

    return VX2Text
