"""AVID-CMA: audio-visual instance discrimination with cross-modal agreement.

Pedro Morgado, Nuno Vasconcelos, Ishan Misra: "Audio-Visual Instance Discrimination with Cross-Modal Agreement",
CVPR 2021, arXiv 2004.12943.

A video encoder and an audio encoder are trained on unlabeled videos with sound. Each clip has to pick the stored vector
of its own instance in the *other* modality out of many (AVID). Then every instance gets more positives, which are
similar to it in *both* modalities (CMA). The encoders are evaluated by fine-tuning on action recognition, by linear
probes, and by linear SVMs on sound classification.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:  # keeps `import papers.avid_cma` cheap
    if name == "AVID":
        return import_module("papers.avid_cma.use").AVID
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
