"""Evaluation metrics: pure functions and small accumulators without Lightning."""
