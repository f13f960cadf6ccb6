"""Encoders that map one modality to a feature vector. They are plain `torch.nn` modules without Lightning."""
