"""The command line `assemble`: one thin file for each group of commands; `main.py` lists them."""
