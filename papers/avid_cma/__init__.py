"""AVID-CMA: audio-visual instance discrimination with cross-modal agreement.

Pedro Morgado, Nuno Vasconcelos, Ishan Misra: "Audio-Visual Instance Discrimination with Cross-Modal Agreement",
CVPR 2021, arXiv 2004.12943.

A video encoder and an audio encoder are trained on videos with sound and without labels: each clip has to pick, out of
many, the memory of its own instance in the *other* modality (AVID). Then every instance gets further positives, those
that are similar to it in *both* modalities (CMA). The encoders are judged by fine-tuning on action recognition, by
linear probes, and by linear support vector machines on sound classification.

The public names live in ``module`` (AVID, CMA), ``model`` (AudioVisualModel), ``objective``, ``data``, ``evaluation``
and ``checkpoints``; import them from there, so that importing this package costs nothing.
"""
