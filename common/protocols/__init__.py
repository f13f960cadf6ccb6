"""Protocols: what is done to any trained model to measure it. They know no paper."""
