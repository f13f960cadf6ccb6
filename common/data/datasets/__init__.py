"""Real data sets, one module each. A module reads the layout in which the data set is distributed."""
