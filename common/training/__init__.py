"""What LightningModules share: data module base, callbacks, optimizers, and compute settings."""
