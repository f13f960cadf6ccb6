"""Writes the trained model of a stage as an export: a folder with weights, record and model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from assemble.reporting.records import Record, without_folders
from assemble.stages.model_card import model_card
from common.errors import StageError
from common.files import parsing, put_back
from common.models.hub import CARD, CONFIGURATION
from common.models.trained import RECORD, TrainedModel, read_contents, save


def write_export(
    model: type[TrainedModel], checkpoint: Path, output: Path, force: bool = False, repo: str | None = None
) -> Path:
    """Write the model of a stage or an export to a folder; the model card names `repo`, its Hub name."""
    put_back(output)
    check_free(output, force)
    trained = model.read(checkpoint)
    if trained.record is None:
        raise StageError(f"{checkpoint}: the stage has no record yet, which an export needs; let it finish first")
    with parsing(Path(trained.where).with_name(RECORD), StageError):
        record = without_folders(Record.from_json(trained.record))
    if trained.step not in (None, record.steps):
        raise StageError(
            f"{checkpoint} is of step {trained.step:,}, but its record is of step {record.steps:,}: export last.ckpt"
        )
    # Build the model once, to ensure that the export can be read.
    model.of(trained)
    with parsing(Path(trained.where).with_name(RECORD), StageError):
        card = model_card(record, output.name, model, model.card_usage(trained), repo)
    about = {name: getattr(record, name) for name in ("stage", "scale", "seed", "config_hash")}
    save(replace(trained, record=record.to_json()), model, output, about, card)
    return output


def check_free(output: Path, force: bool) -> None:
    """Raise StageError if a folder to write isn't empty, or, with `force`, has anything except an export."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / CONFIGURATION).is_file():
        raise StageError(f"--output {output} has other files: give another folder")
    if not force:
        raise StageError(f"--output {output} already has an export: give another folder, or --force to replace it")
    written = {CONFIGURATION, CARD, ".gitattributes", *read_contents(output).files}
    for path in output.rglob("*"):
        name = path.relative_to(output).as_posix()
        if path.is_file() and name not in written and not name.startswith(".cache/"):  # of `hf download`
            raise StageError(f"--output {output} also holds {name}, which --force would delete: move it away")
