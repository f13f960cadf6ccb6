"""Real data sets, one module each, read in the layout in which they are distributed."""
