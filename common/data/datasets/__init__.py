"""Real data sets, one module each. A module reads the layout in which its set is distributed."""
