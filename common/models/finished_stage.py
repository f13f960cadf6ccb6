"""Read a finished stage without a trainer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.encoders.checkpoint_files import CheckpointError, read_checkpoint
from common.errors import StageError
from common.files import parse_yaml, parsing, read_text
from common.training.switches import Switches


@dataclass(frozen=True)
class FinishedStage:
    """A finished stage: the resolved configuration, and the checkpoint on the CPU."""

    config: dict[str, Any]
    content: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        return self.content["state_dict"]

    @property
    def data_state(self) -> dict[str, Any]:
        """Return the data module's state from the checkpoint."""
        state: dict[str, Any] = self.content.get(self.config["data"]["class_path"].rpartition(".")[2], {})
        return state

    def data(self) -> Any:
        """Build the configured data module without preparing it."""
        import lightning.pytorch as pl

        return instantiate(self.config["data"], pl.LightningDataModule)


def open_finished(checkpoint: Path, kinds: Collection[str], otherwise: str, example: str) -> FinishedStage:
    configuration = checkpoint.parent.parent / "config.yaml"
    for path in (checkpoint, configuration):
        if not path.is_file():
            raise StageError(
                f"{checkpoint} is not a checkpoint of a stage ({path} does not exist): give checkpoints/last.ckpt of a "
                f"finished stage of {example.split('/')[0]}, such as runs/{example}/checkpoints/last.ckpt, or the "
                "folder of an export"
            )
    with parsing(configuration, StageError):
        config = parse_yaml(read_text(configuration))
        kind, _ = str(config["model"]["class_path"]), config["data"]["class_path"]
    if kind not in kinds:
        raise StageError(f"{checkpoint} is of {kind}, which {otherwise}")
    try:
        content = read_checkpoint(checkpoint)
        _ = content["state_dict"]
    except (CheckpointError, KeyError) as error:
        raise StageError(f"{checkpoint} cannot be read: {error}") from None
    model = config["model"]
    # The switches (`common.training.switches`) are not arguments of a module.
    arguments = {name: value for name, value in (model.get("init_args") or {}).items() if name not in Switches._fields}
    return FinishedStage({**config, "model": {**model, "init_args": arguments}}, content)


def instantiate(config: dict[str, Any], base: type) -> Any:
    """Build an object from plain data and check the types."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "built", required=True)
    try:
        parsed = parser.parse_object({"built": config})
    except Exception as error:
        raise StageError(f"the configuration does not fit its classes: {error}") from None
    return parser.instantiate_classes(parsed).built
