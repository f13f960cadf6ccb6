"""M3P: universal representations of images and of text in many languages.

Minheng Ni, Haoyang Huang, Lin Su, Edward Cui, Taroon Bharti, Lijuan Wang, Jianfeng Gao, Dongdong Zhang, Nan Duan: "M3P:
Learning Universal Representations via Multitask Multilingual Multimodal Pre-training", CVPR 2021, arXiv 2006.02635.

A transformer reads text alone, or the regions of an image followed by text. It predicts masked words, masked regions,
and whether image and caption match. It trains on text in a hundred languages and on English captions in which
translations replace some words. So it can retrieve images even in languages without captioned images.
"""

from typing import Any


def __getattr__(name: str) -> Any:  # keeps `import papers.m3p` cheap
    if name != "M3P":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from papers.m3p.use import M3P

    return M3P
