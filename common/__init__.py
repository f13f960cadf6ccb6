"""The library: building blocks for multimodal methods, and protocols that evaluate them.

A package imports only from its own row of this table and from the rows below, never from a paper or `assemble/`:

    models                             a trained model as a folder: save, load, embed
    training, protocols, monitoring    what a LightningModule uses: data modules, evaluations, figures
    data, metrics                      readers and writers of data sets; evaluation metrics
    encoders, losses, memory           networks, loss functions, banks and queues, all plain torch
    files.py, errors.py, types.py      strict YAML, atomic writes, locks; errors for the user; types with a range
"""

__version__ = "0.1.0"
