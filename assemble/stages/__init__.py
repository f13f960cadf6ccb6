"""From a recipe to a record: configuration layers, the stage graph, a stage's run, and its export.

`make reproduce-avid` gets to `trainer.fit` in six functions:

1. `commands/main.py: main` parses the command line and turns errors into exit statuses.
2. `commands/run.py: reproduce` turns the flags into a `Selection`, and prints tables and claims at the end.
3. `stages/reproduce.py: run_paper` plans the stages (`plan.py`), checks stages and data (`needs.py`), and submits each
   stage to a pool of processes after its parents. With one job, `_Here` takes the place of the pool.
4. `stages/reproduce.py: start_stage` runs a stage in this process, or in a new one if Lightning has to start several.
5. `stages/run.py: run_stage` checks a stage, claims its folder (`folder.py`) and explains errors.
6. `stages/training.py: train_and_test` builds trainer, model and data (`cli.py`), fits, tests, and writes the record.

`configuration.py` merges the files of a run: `layers.py`, `recipes.py` and `overrides.py` read them. `export.py` turns
a finished stage into a usable model.
"""
