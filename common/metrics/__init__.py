"""Measures of quality: pure functions and small accumulators without Lightning."""
