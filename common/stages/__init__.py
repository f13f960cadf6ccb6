"""From a recipe to a record: configuration layers, the stage graph, a stage's run, and its export.

`configuration.py` merges and checks, `plan.py` lists what would run, `run.py` runs stages, `cli.py` builds the trainer,
model and data of one. `export.py` turns a finished stage into a usable model.
"""
