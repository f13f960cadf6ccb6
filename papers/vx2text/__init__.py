"""VX2TEXT: text generated from video, sound and speech through differentiable word-like tokens.

Xudong Lin, Gedas Bertasius, Jue Wang, Shih-Fu Chang, Devi Parikh, Lorenzo Torresani: "VX2TEXT: End-to-End Learning of
Video-Based Text Generation From Multimodal Inputs", CVPR 2021, arXiv 2101.12059.

Classifiers label video and sound. The names of their most probable categories become tokens next to the words of
speech, history and question. A text encoder-decoder reads all tokens and writes the answer or the caption. A
Gumbel-softmax relaxation makes the choice of categories differentiable, so the classifiers learn from the target text.
"""

from typing import Any


def __getattr__(name: str) -> Any:  # keeps `import papers.vx2text` cheap
    if name != "VX2Text":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from papers.vx2text.use import VX2Text

    return VX2Text
