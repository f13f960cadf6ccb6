"""Figures, rows of images and clips that a stage leaves in its folder `media/` and sends to W&B."""
