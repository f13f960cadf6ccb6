"""One module per real data set, each reading the layout in which the set is distributed."""
