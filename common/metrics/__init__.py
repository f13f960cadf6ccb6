"""Evaluation metrics: pure functions, and small classes that add up batches. They don't use Lightning."""
