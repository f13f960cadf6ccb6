"""Noise of the joint batch, of which rank r of W holds samples r, r + W, ...; a resumed run draws the same."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor


def batch_generator(module: pl.LightningModule, seed: int) -> torch.Generator:
    """A generator that depends only on the seed and the number of the training batch."""
    return torch.Generator().manual_seed((seed << 32) + module.trainer.fit_loop.total_batch_idx)


def own_rows(module: pl.LightningModule, joint: Tensor) -> Tensor:
    """This process's rows of a tensor of the joint batch, on its device."""
    return joint[module.trainer.global_rank :: module.trainer.world_size].to(module.device, non_blocking=True)
