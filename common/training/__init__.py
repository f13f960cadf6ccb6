"""Code that LightningModules share: base of the data modules, callbacks, optimizers, and compute settings."""
