"""Trained models: read a stage or an export, build its classes safely, embed, and save a folder."""
