"""Base of data modules, callbacks, optimizers, and speed switches for every LightningModule."""
