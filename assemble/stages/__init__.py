"""From a recipe to a record: configuration layers, the stage graph, a stage's run, and its export.

`configuration.py` merges and checks, `plan.py` lists the stages to run, `run.py` runs one, `cli.py` builds its trainer,
model and data. `export.py` turns a finished stage into a usable model.
"""
