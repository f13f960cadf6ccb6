"""Evaluations for any encoder or model: classification, retrieval, detection, generated texts and images.

Each evaluation is a LightningModule that takes an encoder (`EncoderModule` in `base.py`), and has a data module
(`data.py`, `captions.py`). docs/own-encoder.md shows how to evaluate your network.
"""
