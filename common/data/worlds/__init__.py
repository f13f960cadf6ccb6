"""Miniature worlds: generate data once and write them as real files, in the layouts of the data sets they replace."""
