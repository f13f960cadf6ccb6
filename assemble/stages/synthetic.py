"""Trains a stage's module on synthetic batches from its data module's `example_batch`."""

from __future__ import annotations

import logging
import warnings
from collections import UserList
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_map_only

from assemble.reporting.papers import paper_named
from assemble.reporting.records import short_name
from assemble.stages.cli import StageCLI, build
from assemble.stages.configuration import RunConfiguration
from assemble.stages.layers import leaves, merge, place
from common.errors import StageError
from common.training.examples import Example, RandomTensors

#: Trainer options that a synthetic training keeps: precision, and when and how to step.
KEPT = ("precision", "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val")
#: Placeholder for the folders of data and runs, which are never opened.
NOWHERE = "/nonexistent"


class SyntheticData(pl.LightningDataModule):
    """Repeats one batch, and delegates everything else to the configured data module."""

    def __init__(self, data: pl.LightningDataModule, synthetic: Example) -> None:
        super().__init__()
        self.data = data
        self.synthetic = synthetic

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__
        if "synthetic" not in attributes or name.startswith("__"):
            raise AttributeError(name)
        facts = attributes["synthetic"].facts
        return facts[name] if name in facts else getattr(attributes["data"], name)

    def train_dataloader(self) -> UserList[Any]:
        batch = self.synthetic.batch
        if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda":
            batch = tree_map_only(Tensor, Tensor.pin_memory, batch)  # like a loader for a GPU
        # Don't use torch's loader, which reads the value of a random tensor, or a list, which Lightning takes for
        # several loaders. With 1,000 batches, no epoch ends during a measurement.
        return UserList([batch] * max(self.synthetic.batches or 0, 1000))


class StopAfter(pl.Callback):
    """Raises an exception after some batches, so that training stops without its final hooks."""

    class Enough(Exception):
        """Says that the wanted number of batches is done."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 >= self.batches:
            raise self.Enough


@dataclass(frozen=True)
class SyntheticTraining:
    """A stage ready to train on synthetic batches of `size` samples per device."""

    trainer: pl.Trainer
    module: pl.LightningModule
    data: SyntheticData
    size: int

    def run(self) -> None:
        try:
            self.trainer.fit(self.module, datamodule=self.data)
        except StopAfter.Enough:
            return


def devices_of(run: RunConfiguration) -> int:
    """Count the processes of a run: devices per node times nodes. `auto` counts as 1."""
    trainer = run.config["trainer"]
    devices, nodes = str(trainer.get("devices", 1)), str(trainer.get("num_nodes", 1))
    return (int(devices) if devices.isdigit() else 1) * (int(nodes) if nodes.isdigit() else 1)


def synthetic_training(
    run: RunConfiguration,
    trainer_arguments: Mapping[str, Any],
    draw: RandomTensors,
    size: int | None = None,
    build_in: Sequence[AbstractContextManager[Any]] = (),
) -> SyntheticTraining:
    """Build a stage's module with random weights, and synthetic batches of `size` samples for it.

    Without a size, use a device's share of the recipe's batch.
    """
    if size is None:
        whole, devices = int(run.config["data"]["init_args"]["batch_size"]), devices_of(run)
        size, rest = divmod(whole, devices)
        if rest:
            raise StageError(
                f"data.batch_size ({whole}) is the global batch and must be divisible by {devices} devices"
            )
    config = without_files(run)
    config["trainer"] = {
        **{name: value for name, value in config["trainer"].items() if name in KEPT},
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "num_sanity_val_steps": 0, "use_distributed_sampler": False, "log_every_n_steps": 20,
    }  # fmt: skip
    if size % (config["model"]["init_args"].get("batch_norm_group") or 1):
        # One device cannot form a group that spans devices.
        config = merge(config, {"model": {"init_args": {"batch_norm_group": None}}})
    cli = _built(run, config, trainer_arguments, build_in)
    if not hasattr(cli.datamodule, "example_batch"):
        raise StageError(f"no synthetic batches: {type(cli.datamodule).__name__} has no method example_batch")
    example = cli.datamodule.example_batch(cli.model, size, draw)
    if hasattr(cli.model, "start_without_files"):
        cli.model.start_without_files()
    return SyntheticTraining(cli.trainer, cli.model, SyntheticData(cli.datamodule, example), size)


def built_without_files(run: RunConfiguration, *contexts: AbstractContextManager[Any]) -> StageCLI:
    """Build a stage's module and data module inside some contexts, without the files that the configuration names."""
    config = {**without_files(run), "trainer": {"precision": run.config["trainer"]["precision"]}}
    with quiet():
        return _built(run, config, {"accelerator": "cpu"}, contexts)


def _built(
    run: RunConfiguration,
    config: dict[str, Any],
    trainer_arguments: Mapping[str, Any],
    contexts: Sequence[AbstractContextManager[Any]],
) -> StageCLI:
    """Build trainer, model and data inside some contexts. The trainer writes no files."""
    nothing = {"logger": False, "enable_checkpointing": False, "default_root_dir": NOWHERE}
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return build(run, config, {**nothing, **trainer_arguments})


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's messages and all warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def without_files(run: RunConfiguration) -> dict[str, Any]:
    """Return the configuration with the fields that name files replaced by `Paper.without_files`."""
    config = run.with_placeholders(DATA=NOWHERE, RUN=NOWHERE)
    present = {short_name(path) for path, _ in leaves(config)}
    for name, value in paper_named(run.paper).without_files.items():
        if any(path == name or path.startswith(f"{name}.") for path in present):
            if isinstance(value, dict):
                value = [f"{value['named']} {number}" for number in range(value["count"])]
            config = merge(config, place(config, name, value))
    return config
