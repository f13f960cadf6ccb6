"""Miniature worlds: generated data written once as real files, in the layouts of the data sets they replace."""
