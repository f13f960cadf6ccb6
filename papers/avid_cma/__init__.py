"""AVID-CMA: audio-visual instance discrimination with cross-modal agreement.

Pedro Morgado, Nuno Vasconcelos, Ishan Misra: "Audio-Visual Instance Discrimination with Cross-Modal Agreement",
CVPR 2021, arXiv 2004.12943.

A video encoder and an audio encoder are trained on videos with sound and without labels: each clip has to pick, out of
many, the memory of its own instance in the *other* modality (AVID). Then every instance gets further positives, those
that are similar to it in *both* modalities (CMA). The encoders are evaluated by fine-tuning on action recognition, by
linear probes, and by linear support vector machines on sound classification.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:  # importing the package alone costs nothing
    if name == "AVID":
        return import_module("papers.avid_cma.use").AVID
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
