"""A finished stage, opened for use without a trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common.training.errors import StageError


class FinishedStage(NamedTuple):
    """A stage as its configuration builds it, and what it learned.

    Attributes:
        module: the LightningModule, with the weights that it was built with.
        data: its data module; nothing is prepared yet.
        state: the state dict of its checkpoint, on the CPU.
    """

    module: Any
    data: Any
    state: dict[str, Any]


def open_finished(
    checkpoint: str | Path,
    kind: str,
    otherwise: str,
    example: str,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> FinishedStage:
    """Build the model and the data of a finished stage and read its checkpoint.

    Args:
        checkpoint: `checkpoints/last.ckpt` of the stage; `config.yaml` lies in the folder above.
        kind: import path of the LightningModule that it must be of.
        otherwise: what another kind cannot do, and which stages can; stands in the message.
        example: a stage, as `<paper>/<scale>/seed<k>/<stage>`; stands in the message.
        change: changes the configuration before anything is built.

    Raises:
        StageError: the checkpoint or its configuration is missing or damaged, or it is of another kind.
    """
    checkpoint = Path(checkpoint)
    configuration = checkpoint.parent.parent / "config.yaml"
    for path in (checkpoint, configuration):
        if not path.is_file():
            raise StageError(
                f"{path} does not exist: give checkpoints/last.ckpt in the folder of a finished stage of "
                f"{example.split('/')[0]}, such as runs/{example}/checkpoints/last.ckpt"
            )
    # Heavy imports only now: whoever mistypes a path need not wait for them.
    import yaml

    from common.encoders.checkpoint_files import CheckpointError, read_checkpoint
    from common.training.cli import StageCLI

    config = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    found = str((config.get("model") or {}).get("class_path"))
    if found != kind:
        raise StageError(f"{checkpoint} is of {found}, which {otherwise}")
    try:
        state = read_checkpoint(checkpoint)["state_dict"]
    except (CheckpointError, KeyError) as error:
        raise StageError(f"{checkpoint} cannot be read: {error}") from None
    if change is not None:
        change(config)
    # What the trainer says about itself, which is not used, is no part of an answer.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    built = StageCLI({"trainer": trainer, "model": config["model"], "data": config["data"]})
    return FinishedStage(built.model, built.datamodule, state)
