"""Other complete methods in the tables: one file each, with network, data and training."""
