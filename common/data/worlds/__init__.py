"""Miniature worlds: generate small data sets and write them as files, in the layouts of the real data sets."""
