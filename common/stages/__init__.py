"""From a recipe to a record: the layers of a configuration, the graph of stages, the run of one, and its export.

`configuration.py` merges and checks, `plan.py` says what would run, `run.py` runs stages, `cli.py` builds the trainer,
model and data of one. `export.py` makes a model that people use of a finished stage.
"""
