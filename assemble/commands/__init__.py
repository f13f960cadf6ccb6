"""Define the commands of `assemble`, one file for each group; `main.py` lists them."""
