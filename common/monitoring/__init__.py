"""Figures, images and clips that a stage writes to its folder `media/` and sends to W&B."""
