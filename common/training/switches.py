"""Compute settings of every stage.

Configuration files and flags can set a switch at the top level (`--compiled true`). `take_switches` separates switches
from the model's arguments. Most switches change results only by rounding. `batch_norm_group` is part of a recipe and
changes results; `checkpoint_minutes` changes nothing. See `docs/cluster.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.training.batch_norm import normalize_in_groups, share_buffers
from common.training.optimizers import lay_out_state


class Switches(NamedTuple):
    """How the networks of a stage compute.

    Attributes:
        compiled: compile every block with `torch.compile` in training. A string selects the backend.
        channels_last: use the channels-last memory format for convolutions, which is faster on most devices.
        gradient_checkpointing: recompute blocks in the backward pass, which saves memory but takes about a third more
            time.
        batch_norm_group: number of samples that share batch statistics (see `batch_norm.py`). None: all samples of a
            device.
        checkpoint_minutes: minimum time between two resume checkpoints, in minutes.
    """

    compiled: bool | str = False
    channels_last: bool = False
    gradient_checkpointing: bool = False
    batch_norm_group: int | None = None
    checkpoint_minutes: float = 10.0


class ApplySwitches(Callback):
    """Applies a stage's switches to the module in place, so that the keys in checkpoints don't change."""

    def __init__(self, switches: Switches) -> None:
        self.switches = switches

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Do this before optimizers and DDP read the weights.
        if self.switches.channels_last:
            lay_out_channels_last(pl_module, trainer.strategy.root_device.type)
        group, data = self.switches.batch_norm_group, getattr(trainer, "datamodule", None)
        if group is not None and stage == "fit" and data is not None:
            norms = (module for module in pl_module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
            if not any(parameter.requires_grad for norm in norms for parameter in norm.parameters()):
                raise ValueError(
                    "batch_norm_group has no effect: the model trains no torch batch normalization; remove it"
                )
            normalize_in_groups(pl_module, group, data.batch_size, trainer.world_size)
        if stage == "fit" and isinstance(trainer.strategy, DDPStrategy):
            # Rank 0 saves its buffers, which don't depend on other ranks. Broadcasting them would delay every step.
            trainer.strategy._ddp_kwargs.setdefault("broadcast_buffers", False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        share_buffers(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        share_buffers(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        compiled = self.switches.compiled
        if compiled:
            import torch._functorch.config

            # Blocks of many sizes share one code object; torch's limit would leave some of them uncompiled.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            if not pl_module.automatic_optimization:
                # Manual optimization may go backward twice through a graph, whose buffers must survive the first pass.
                torch._functorch.config.donated_buffer = False
        for block in blocks_of(pl_module):
            run: Callable[..., Any] = block.forward
            if compiled:
                run = torch.compile(run, backend=compiled if isinstance(compiled, str) else "inductor")
            if self.switches.gradient_checkpointing:
                run = functools.partial(_checkpointed, block, run)
            if run != block.forward:
                block.forward = run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The loaded checkpoint may have another memory layout.
        for optimizer in trainer.optimizers:
            lay_out_state(optimizer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The test after training runs the original blocks.
        for block in blocks_of(pl_module):
            block.__dict__.pop("forward", None)


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost repeated blocks: modules in a ModuleList or Sequential, and modules that set `repeats`."""
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for member in child:
                if _has_layers(member) and not isinstance(member, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                    yield member
                else:
                    yield from blocks_of(member)
        elif getattr(child, "repeats", False):
            yield child
        else:
            yield from blocks_of(child)


def _has_layers(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


@torch.no_grad()
def lay_out_channels_last(network: nn.Module, device: str = "cpu") -> None:
    """Convert the weights of all convolutions to channels-last memory format. Outputs then get the same format.

    On the CPU, raises for a strided 1x1 convolution of fewer than 8 channels. Without AVX-512, oneDNN's gradient would
    write out of bounds (torch 2.14 with AVX2).
    """
    for name, layer in network.named_modules():
        if (
            isinstance(layer, nn.Conv2d)
            and device == "cpu"
            and layer.kernel_size == (1, 1)
            and layer.stride != (1, 1)
            and layer.in_channels < 8
        ):
            raise ValueError(
                f"channels_last: {name} is a strided 1x1 convolution of {layer.in_channels} channels, which corrupts "
                "memory on some CPUs; use 8 channels or more, or leave channels_last false"
            )
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)


def _checkpointed(block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    contexts = nullcontext(), _EarlierBuffers(block)
    return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)


class _EarlierBuffers:
    """Recomputes a block with the buffers from before the first pass, and discards the second pass's buffer updates.

    Otherwise, running statistics would change twice per step, and spectral normalization would divide by another value.
    Buffers are swapped, not copied, because autograd forbids in-place changes of saved values.
    """

    def __init__(self, block: nn.Module) -> None:
        self.before: dict[tuple[nn.Module, str], Tensor] = {
            (module, name): value.clone()
            for module in block.modules()
            if module.training
            for name, value in module._buffers.items()
            if value is not None
        }
        self.now: dict[tuple[nn.Module, str], Tensor | None] = {}

    def __enter__(self) -> None:
        for (module, name), value in self.before.items():
            self.now[module, name] = module._buffers[name]
            module._buffers[name] = value.clone()

    def __exit__(self, *_: object) -> None:
        for (module, name), value in self.now.items():
            module._buffers[name] = value
        self.now.clear()
