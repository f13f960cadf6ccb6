"""Building blocks for multimodal methods, protocols that evaluate them, and the application that runs them.

A package imports from its own layer and those below it, and no paper:

    commands                           the command line, one file for each group of commands
    stages                             configuration, plan, run, export: from a recipe to a record
    training, protocols, monitoring    what a LightningModule uses: data modules, evaluations, figures
    data, metrics                      readers and writers of data sets; evaluation metrics
    encoders, losses, memory           networks, loss functions, banks and queues, all plain torch
    reporting                          records, tables and claims, without torch
    files.py, errors.py, types.py      strict YAML, atomic writes, locks; errors for the user; types with a range
"""

__version__ = "0.1.0"
