"""Other complete methods in the tables: network, data and training of each in one file."""
