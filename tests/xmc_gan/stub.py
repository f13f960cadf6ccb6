"""Run XMC-GAN's module without a trainer, one step at a time."""

from __future__ import annotations

from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from papers.xmc_gan.loss import XMCGANLoss
from papers.xmc_gan.module import XMCGANModule
from papers.xmc_gan.networks import Discriminator, Generator


def steppable(module: XMCGANModule) -> XMCGANModule:
    """Give a module its optimizers and a minimal trainer, and keep its logged values in `logged`."""
    optimizers = module.configure_optimizers()
    module.optimizers = lambda use_pl_optimizer=True: optimizers  # type: ignore[method-assign]
    module.logged = {}  # type: ignore[assignment]
    module.log_dict = lambda values, **_: module.logged.update(values)  # type: ignore[method-assign, operator, union-attr]
    module.log = lambda name, value, **_: module.logged.update({name: value})  # type: ignore[method-assign, operator, union-attr]
    module.__dict__["_trainer"] = SimpleNamespace(
        global_rank=0,
        world_size=1,
        fit_loop=SimpleNamespace(total_batch_idx=0),
        datamodule=SimpleNamespace(minibatches=2),
    )
    return module.train()


def tiny(batch_norm_group: int | None = None, **options: Any) -> XMCGANModule:
    """Make a module of a few thousand parameters for images of 32 pixels, always with the same weights.

    Args:
        batch_norm_group: option of the generator.
        options: options of the loss or of the module.
    """
    torch.manual_seed(3)
    generator = Generator(
        width=4, channels=[4, 4, 2, 1], cond_size=8, z_dim=5, embedding_dim=6, batch_norm_group=batch_norm_group
    )
    discriminator = Discriminator(width=4, channels=[1, 2, 4, 4], cond_size=8, embedding_dim=6)
    of_loss = {name: options.pop(name) for name in signature(XMCGANLoss).parameters if name in options}
    loss = XMCGANLoss(**{"weight_image_net": 0.0, **of_loss})
    return steppable(XMCGANModule(generator, discriminator, loss, **options))


def tiny_batch(size: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """Make a minibatch with words, and its noise."""
    generator = torch.Generator().manual_seed(7)
    batch = {
        "image": torch.rand(size, 3, 32, 32, generator=generator),
        "words": torch.randn(size, 5, 6, generator=generator),
        "sentence": torch.randn(size, 6, generator=generator),
        "length": torch.randint(1, 6, (size,), generator=generator),
        "index": torch.arange(size),
    }
    return batch, torch.randn(size, 5, generator=generator)
