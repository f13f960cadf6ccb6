"""Write a stage's trained model as an export: a folder with weights, record and model card."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assemble.reporting.papers import paper_named
from assemble.reporting.records import Record, without_folders
from assemble.stages.layers import leaves
from assemble.stages.recipe_data import entries_read
from common.errors import StageError
from common.files import parse_yaml, parsing
from common.models.trained import RECORD, TrainedModel, save
from common.types import class_at

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

LIBRARY = "representation-assemble"
#: A model's method -> its task on the Hub. Models without these methods extract features.
TASKS = {"generate": "text-to-image", "answer": "video-text-to-text"}
SCALES = {
    "paper": "It was trained at the paper's scale.",
    "single": "It was trained on one GPU for about a day, on less data and for fewer steps than in the paper, so its "
    "numbers are not comparable with published ones.",
    "mini": "**It is a miniature**: a small network, trained for minutes. It shows how the method works and is of no "
    "use on real data; its numbers are not comparable with published ones.",
    "smoke": "**It is a smoke test**: a tiny network after a few steps, which checks that everything runs. It has "
    "learned nothing.",
}
#: Parts of a configuration whose weights don't become part of the model: metrics and teachers.
_OTHERS = {"evaluation", "choice", "image_network", "tokenizer"}


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


def model_card(record: Record, folder: str, model: type[Any], usage: str, repo: str | None = None) -> str:
    """Write the Hub's metadata, then the card in Markdown. `usage` is a field of the paper's `model_card.yaml`."""
    from jinja2 import Environment, PackageLoader

    paper = paper_named(record.paper)
    texts = parse_yaml((paper.root / "model_card.yaml").read_text(encoding="utf-8"))
    paragraphs = (inspect.getdoc(importlib.import_module(f"papers.{paper.name}")) or "").split("\n\n")
    environment = Environment(
        loader=PackageLoader("assemble.reporting"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = lambda text: text.replace("|", r"\|")
    starts = _starts(record)
    return environment.get_template("model_card.md.j2").render(
        **dict(zip(("title", "citation", "method"), paragraphs)),
        metadata=metadata(record, folder, model),
        paper=paper,
        record=record,
        scale=SCALES[record.scale],
        model=model,
        source=f'from_pretrained("{repo}")' if repo else f'from_export("{folder}")',
        usage=texts[usage],
        limits=texts["limits"],
        facts=_facts(record, starts),
        starts=starts,
        world=_world(record),
        sets=_sets(record),
    )


def metadata(record: Record, folder: str, model: type[Any]) -> ModelCardData:
    """Return the Hub's metadata: license, library, task, tags, data sets, and the metrics of the record."""
    from huggingface_hub import EvalResult, ModelCardData

    world = _world(record)
    sets = _sets(record)
    task = next((name for method, name in TASKS.items() if hasattr(model, method)), "feature-extraction")
    data = ", ".join(source.title for source in ([world] if world else sets)) or "unknown"
    foreign = {*_starts(record)} - {parent["stage"] for parent in record.parents.values()}
    generated = world is not None and not world.credit and not foreign
    results = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"\W+", "-", data.lower()).strip("-"),
            dataset_name=data,
            metric_type=name,
            metric_name=name,
            metric_value=value,
            source_name="record.json: what the stage measured",
            source_url="record.json",
        )
        for name, value in sorted(record.metrics.items())
        if value is not None and record.scale != "smoke"
    ]
    title = paper_named(record.paper).title.lower().replace(" ", "-")
    scale = [] if record.scale == "paper" else [record.scale]
    return ModelCardData(
        # The card lists the terms of the training data; only generated data has none.
        license="apache-2.0" if generated else "other",
        license_name=None if generated else "see-data",
        library_name=LIBRARY,
        pipeline_tag=task,
        tags=[LIBRARY, title, "pytorch", "safetensors", *model.embeds, *scale],
        datasets=[dataset.name for dataset in sets] or None,
        model_name=folder if results else None,
        eval_results=results or None,
    )


def _facts(record: Record, starts: list[str]) -> dict[str, str]:
    return {
        "stage": f"{record.stage} ({record.job.replace('_', '-')}, recipe {record.recipe})",
        "scale": record.scale,
        "seed": record.draw.label,
        "configuration": f"`{record.config_hash}`, lineage `{record.lineage_hash}`",
        "starts from": ", ".join(starts) or "random weights",
        "steps": f"{record.steps:,} of {record.global_batch} samples, {record.precision}",
        "trained": f"{record.started}, {record.wall_seconds:,.0f} s on {record.machine}",
        "revision": record.revision,
        "weights measured": record.selection,
    }


def _starts(record: Record) -> list[str]:
    """Return the stages and released files from which the training started."""
    parents = record.parents.items()
    names = {str(parent["stage"]) for field, parent in parents if not _OTHERS.intersection(field.split("."))}
    features = record.config["data"]["init_args"].get("text_features")
    for field, value in leaves({"model": record.config["model"], "features": features}):
        *above, name = field.split(".")
        weights = name in ("warm_start", "bert") or name.endswith("pretrained")
        if weights and isinstance(value, str) and not _OTHERS.intersection(above):
            names.add(value.rstrip("/").rpartition("/")[2])
    return sorted(names)


def _world(record: Record) -> Any:
    """Return the class of the synthetic world that replaced the data sets, or None."""
    world = record.config["data"]["init_args"].get("world")
    if world and not str(world["class_path"]).startswith("common.data.worlds."):  # the record may be untrusted
        raise StageError(f"record.json: {world['class_path']!r:.80} is not a world of this suite")
    return class_at(world["class_path"]) if world else None


def _sets(record: Record) -> list[Any]:
    paths = [entry["class_path"] for entry in entries_read(record.config["data"])]
    return [class_at(path) for path in dict.fromkeys(paths)]
