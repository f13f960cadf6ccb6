"""Workarounds for Lightning 2.6 and torchmetrics 1.9, one function each.

The workarounds use Lightning's internals, so check each of them when the pinned version in pyproject.toml changes.
Callbacks that correct Lightning's count of epochs and its checkpoints are in `common/training/callbacks.py`. Importing
this module doesn't import Lightning.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LightningCLI

LEFT_OUT = frozenset({"matplotlib", "scipy", "torchvision", "transformers"})


def import_lightning() -> None:
    """Import `lightning.pytorch` in half the time.

    torchmetrics 1.9 imports the packages of `LEFT_OUT`, if they are installed, for metrics and plots that we don't use.
    """
    if "torchmetrics" in sys.modules:
        importlib.import_module("lightning.pytorch")
        return
    from lightning_utilities.core import imports

    met, available = imports.RequirementCache.__bool__, imports.package_available

    def is_met(requirement: imports.RequirementCache) -> bool:
        return re.split("[<>=! ]", requirement.requirement or "")[0] not in LEFT_OUT and met(requirement)

    imports.RequirementCache.__bool__ = is_met  # type: ignore[method-assign, assignment]
    imports.package_available = lambda name: name not in LEFT_OUT and available(name)  # type: ignore[assignment]
    gc.disable()  # looking for garbage among modules, which stay loaded, would take a fifth of the time
    try:
        importlib.import_module("lightning.pytorch")
    finally:
        gc.enable()
        imports.RequirementCache.__bool__ = met  # type: ignore[method-assign]
        imports.package_available = available
    # Let the garbage collector skip modules, which stay loaded.
    gc.freeze()


def quiet_lightning() -> None:
    """Hide messages of Lightning 2.6 that don't apply to our stages."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Keep the message about which rank died.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*is smaller than the logging interval.*",
        ".*LeafSpec.*is deprecated.*",
        ".*have no .validation_step.*",  # the module validates itself, see common/protocols/search.py
        ".*module.s. in eval mode.*",  # intended for frozen encoders
        ".*ModelCheckpoint with manual optimization.*",  # we want the weights after the step
        ".*overridden .on_before_batch_transfer. in .LightningModule.*",  # intended
        ".*broadcast_buffers. is deprecated.*",  # its successor broadcasts banks and queues at the start
        ".*recommended to use .self.log.*sync_dist=True.*",  # logged values were gathered from all ranks
        ".*dataloader is not resumable.*",  # ours is: the sampler starts at the step of the checkpoint
        "The `srun` command is available.*",  # the user chose to run the stage without it, on this machine alone
        "Be aware that when using `ckpt_path`.*",  # a test of a checkpoint needs no training callbacks
    ):
        warnings.filterwarnings("ignore", message=message)


def leave_signals_to_us(trainer: pl.Trainer) -> None:
    """Keep Lightning 2.6 from handling signals, since it would save in the middle of a step and call collectives.

    Also stop Lightning from broadcasting a SIGTERM flag before each batch. The broadcast syncs the device, and nothing
    sets the flag.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def write_last_checkpoint_last(trainer: pl.Trainer) -> None:
    """Write the checkpoint to resume from after the other checkpoints. Lightning 2.6 writes in the order of callbacks.

    A run that is killed in between resumes from an earlier step and writes the other checkpoints again.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint

    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.sort(key=lambda callback: isinstance(callback, ModelCheckpoint) and callback.filename == "last")


def end_training_without_steps(trainer: pl.Trainer) -> None:
    """Run the training hooks when a run resumes with no step left, since Lightning 2.6 skips the hooks.

    One of them, `on_train_end`, keeps the best weights.
    """
    loop = trainer.fit_loop
    run = loop.run

    def begin_and_end() -> None:
        loop.setup_data()
        epoch: Any = loop.epoch_progress.current
        counted, last = epoch.completed == epoch.ready, epoch.ready == loop.max_epochs
        done = loop.done
        if not counted and (done or (last and loop.epoch_loop.batch_progress.is_last_batch)):
            # Count the checkpoint's step for the loggers, since no step is left to do so.
            loop.epoch_loop._batches_that_stepped += 1
        if not done:
            run()
            return
        loop.on_run_start()
        if not counted:
            epoch.processed = epoch.completed = epoch.ready
        loop.on_run_end()

    loop.run = begin_and_end  # type: ignore[method-assign]


def whole_number_limits(trainer: dict[str, Any] | None) -> dict[str, int]:
    """Return the `limit_..._batches` that are whole numbers, to set them on the trainer without jsonargparse.

    Lightning 2.6 annotates the limits as `int | float`, so jsonargparse turns 1 (a batch) into 1.0 (a whole epoch).
    """
    settings = (trainer or {}).items()
    return {name: value for name, value in settings if name.startswith("limit_") and type(value) is int}


def dump_without_validation(cli: LightningCLI) -> None:
    """Skip LightningCLI 2.6's second validation, which takes a fifth of the time to build a stage."""
    cli.parser.dump = functools.partial(cli.parser.dump, skip_validation=True)
