"""Random numbers for the global batch, the same on any number of devices and after a resume."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor


def batch_generator(module: pl.LightningModule, seed: int) -> torch.Generator:
    """A generator that depends only on the seed and the number of the training batch."""
    return torch.Generator().manual_seed((seed << 32) + module.trainer.fit_loop.total_batch_idx)


def own_rows(module: pl.LightningModule, joint: Tensor) -> Tensor:
    """This process's rows of a tensor of the global batch (r, r + W, ... on rank r of W), on its device."""
    return joint[module.trainer.global_rank :: module.trainer.world_size].to(module.device, non_blocking=True)
