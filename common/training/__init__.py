"""What every LightningModule trains with: the base of data modules, callbacks, optimizers, and switches of speed."""
