"""Evaluations that take any encoder or model: classification, retrieval, detection, generated texts and images.

Each is a LightningModule that the configuration gives an encoder (`base.py`: `EncoderModule`), with a data module for
it (`data.py`, `captions.py`). None knows a paper: docs/own-encoder.md gives them a network of your own.
"""
