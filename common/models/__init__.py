"""Trained models: read a finished stage or an export, build the model safely, embed data, and export to a folder."""
