"""Training without data: a stage's own module and optimizer on made-up batches of the shapes that its data has.

A data module's `example_batch` makes the batches; the head of `tables.yaml` says what stands in the places of files.
Memory and time can then be estimated before a run, and a step be measured on a machine that holds neither data nor
released weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_map_only

from common.errors import StageError
from common.reporting.papers import paper_named
from common.reporting.records import short_name
from common.stages.cli import build
from common.stages.configuration import RunConfiguration, leaves, merge, place
from common.training.examples import Draw, Example

#: What of a recipe's trainer a synthetic training keeps: precision and what decides when and how a step is made.
KEPT = ("precision", "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val")
#: Stands for the folders of data and runs, which are never opened.
NOWHERE = "/nonexistent"


class SyntheticData(pl.LightningDataModule):
    """The same batch again and again; all else is that of the data module in whose place it stands.

    Args:
        data: the configured data module, never set up.
        synthetic: what stands in for its data.
    """

    def __init__(self, data: pl.LightningDataModule, synthetic: Example) -> None:
        super().__init__()
        self.data = data
        self.synthetic = synthetic

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__
        if "synthetic" not in found or name.startswith("__"):
            raise AttributeError(name)
        return found["synthetic"].facts[name] if name in found["synthetic"].facts else getattr(found["data"], name)

    def train_dataloader(self) -> _SameBatch:
        batch = self.synthetic.batch
        if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda":
            # As a loader for a GPU does it; from other memory a copy takes several times as long.
            batch = tree_map_only(Tensor, Tensor.pin_memory, batch)
        # An epoch must not end within a measurement.
        return _SameBatch(batch, max(self.synthetic.batches or 0, 1000))


@dataclass
class _SameBatch:
    """A loader; not torch's, whose iterator draws a number and asks for its value."""

    batch: Any
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.length):
            yield self.batch


class StopAfter(pl.Callback):
    """Ends a training after some batches, by an exception: nothing that follows a training is wanted."""

    class Enough(Exception):
        """The wanted number of batches is done."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 >= self.batches:
            raise self.Enough


@dataclass(frozen=True)
class SyntheticTraining:
    """A stage that is ready to train on made-up batches.

    Attributes:
        trainer, module, data: what `run` brings together.
        size: samples of a batch on one device.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    data: SyntheticData
    size: int

    def run(self) -> None:
        """Train until a `StopAfter` ends it."""
        try:
            self.trainer.fit(self.module, datamodule=self.data)
        except StopAfter.Enough:
            return


def devices_of(run: RunConfiguration) -> int:
    """Processes of a run: devices of a node times nodes; 1 where their number is left to the machine."""
    trainer = run.config["trainer"]
    devices, nodes = str(trainer.get("devices", 1)), str(trainer.get("num_nodes", 1))
    return (int(devices) if devices.isdigit() else 1) * (int(nodes) if nodes.isdigit() else 1)


def size_per_device(run: RunConfiguration) -> int:
    """Samples of a batch on one device.

    Raises:
        StageError: the global batch cannot be divided.
    """
    whole, devices = int(run.config["data"]["init_args"]["batch_size"]), devices_of(run)
    if whole % devices:
        raise StageError(f"data.batch_size ({whole}) is the global batch and must be divisible by {devices} devices")
    return whole // devices


def synthetic_training(
    run: RunConfiguration, trainer_arguments: Mapping[str, Any], draw: Draw, size: int | None = None
) -> SyntheticTraining:
    """Build a stage's module and optimizer with random weights, and made-up batches for them.

    Args:
        run: the stage's configuration.
        trainer_arguments: over those of the recipe: accelerator or strategy, callbacks, precision.
        draw: source of the numbers.
        size: samples of a batch; None for the share of a device in the recipe's batch.

    Raises:
        StageError: the paper cannot make batches for this kind of data.
    """
    size = size_per_device(run) if size is None else size
    config = without_files(run, paper_named(run.paper).without_files)
    config["trainer"] = {
        **{name: value for name, value in config["trainer"].items() if name in KEPT},
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "num_sanity_val_steps": 0, "use_distributed_sampler": False, "log_every_n_steps": 20,
    }  # fmt: skip
    arguments = config["model"]["init_args"]
    if size % (arguments.get("batch_norm_group") or 1):
        # A part of a group that spans devices: one device alone cannot tell more about it.
        config = merge(config, {"model": {"init_args": {"batch_norm_group": None}}})
    quiet = {"logger": False, "enable_checkpointing": False, "default_root_dir": NOWHERE}
    cli = build(run, config, {**quiet, **trainer_arguments})
    if not hasattr(cli.datamodule, "example_batch"):
        name = type(cli.datamodule).__name__
        raise StageError(f"{run.paper} makes no made-up batches: {name} has no method example_batch")
    made = cli.datamodule.example_batch(cli.model, size, draw)
    if hasattr(cli.model, "start_without_files"):
        cli.model.start_without_files()
    return SyntheticTraining(cli.trainer, cli.model, SyntheticData(cli.datamodule, made), size)


def without_files(run: RunConfiguration, instead: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with something else in the places of files.

    Args:
        run: the stage's configuration.
        instead: dotted fields, without `init_args`, and what they become where the configuration has them; see
            `Paper.without_files`.
    """
    config = run.with_placeholders(DATA=NOWHERE, RUN=NOWHERE)
    present = {short_name(path) for path, _ in leaves(config)}
    for name, value in instead.items():
        if any(path == name or path.startswith(f"{name}.") for path in present):
            if isinstance(value, dict):
                value = [f"{value['named']} {number}" for number in range(value["count"])]
            config = merge(config, place(config, name, value))
    return config
