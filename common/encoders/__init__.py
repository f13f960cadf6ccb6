"""Encoders from one modality to a feature vector: plain `torch.nn` modules without Lightning."""
