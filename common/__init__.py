"""What several papers share: parts of models, data, training, records and tables."""

__version__ = "0.1.0"
