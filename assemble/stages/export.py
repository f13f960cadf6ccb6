"""Write a stage's trained model as an export: a folder with weights, record and model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from assemble.reporting.records import Record, without_folders
from assemble.stages.model_card import model_card
from common.errors import StageError
from common.files import parsing
from common.models.trained import RECORD, TrainedModel, save


def write_export(model: type[TrainedModel], checkpoint: Path, output: Path, repo: str | None = None) -> Path:
    """Write the model of a stage or an export to a new folder. The model card names `repo` on the Hub."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise StageError(f"--output {output} exists: give a new folder, or delete it first")
    trained = model.read(checkpoint)
    if trained.record is None:
        raise StageError(f"{checkpoint}: the stage has no record yet, and an export needs one: let it finish first")
    with parsing(Path(trained.where).with_name(RECORD), StageError):
        record = without_folders(Record.from_json(trained.record))
        card = model_card(record, output.name, model, model.card_usage(trained), repo)
    if trained.step not in (None, record.steps):
        steps = f"step {trained.step:,}, but its record is of step {record.steps:,}"
        raise StageError(f"{checkpoint} is of {steps}: export last.ckpt")
    model.of(trained)  # to ensure that the export can be read
    about = {name: getattr(record, name) for name in ("stage", "scale", "seed", "config_hash")}
    save(replace(trained, record=record.to_json()), model, output, about, card)
    return output
