"""M3P: universal representations of images and of text in many languages.

Minheng Ni, Haoyang Huang, Lin Su, Edward Cui, Taroon Bharti, Lijuan Wang, Jianfeng Gao, Dongdong Zhang, Nan Duan: "M3P:
Learning Universal Representations via Multitask Multilingual Multimodal Pre-training", CVPR 2021, arXiv 2006.02635.

One transformer reads text alone, or the regions of an image followed by text. It is trained on three streams at once:
text of a hundred languages, images with English captions, and images with captions some of whose words are replaced by
their translations out of dictionaries. It predicts masked words and masked regions and whether image and caption
belong together; the last is what finds images for captions, and captions for images, in languages for which no image
was ever captioned.

``M3P.from_export`` loads a trained model. What trains one lives in ``module`` (M3PPretraining, M3PRetrieval,
WarmStart), ``model``, ``objective``, ``data``, ``code_switching``, ``masking``, ``evaluation`` and ``checkpoints``;
import them from there, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from papers.m3p.use import M3P

__all__ = ["M3P"]

#: What pre-training can read besides what the recipes do.
OPTIONAL_DATASETS = ("common.data.datasets.sbu.SBU",)


def __getattr__(name: str) -> Any:
    if name != "M3P":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from papers.m3p.use import M3P

    return M3P
