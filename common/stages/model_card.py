"""The card of an exported model: what it is, how to use it, what was measured, what it was made of, and its limits."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from common.errors import StageError
from common.reporting.papers import paper_named
from common.reporting.records import Record
from common.stages.configuration import class_at
from common.stages.run import dataset_entries

LIBRARY = "representation-assemble"
#: What the Hub calls a model that has a method; any other gives features.
TASKS = {"generate": "text-to-image", "answer": "video-text-to-text"}
SCALES = {
    "paper": "It was trained at the paper's scale.",
    "single": "It was trained on one card for about a day: on fewer data and for fewer steps than the paper's, so its "
    "numbers are not comparable with published ones.",
    "mini": "**It is a miniature**: a small network, trained for minutes on a small stand-in of the data. It shows how "
    "the method works and is of no use on real data; its numbers are not comparable with published ones.",
    "smoke": "**It is a smoke test**: a tiny network after a few steps, which checks that everything runs. It has "
    "learned nothing.",
}


def model_card(record: Record, folder: str, model: type[Any], usage: str, repo: str | None = None) -> str:
    """Markdown of the card, with what the Hub reads of it in front.

    Args:
        record: of the stage that trained the model.
        folder: name of the export's folder, for the example.
        model: class of the model.
        usage: line of Python that uses `model`.
        repo: where the model will lie on the Hub.

    Raises:
        StageError: the docstring of the paper's package has no title, citation and method.
    """
    paper = paper_named(record.paper)
    package = importlib.import_module(f"papers.{paper.name}")
    paragraphs = (inspect.getdoc(package) or "").split("\n\n")
    if len(paragraphs) < 3:
        raise StageError(
            f"papers/{paper.name}/__init__.py: the card needs a docstring of three paragraphs: a title, the citation, "
            "and what the method does"
        )
    title, citation, method, *_ = paragraphs
    git = record.git
    revision = (
        f"`{git['revision']}`{' with uncommitted changes' if git['dirty'] else ''}" if git["revision"] else "unknown"
    )
    machine = record.hardware
    accelerators = ", ".join(machine.get("accelerators") or []) or f"{machine.get('cpu')}, {machine.get('cores')} cores"
    facts = [
        ("stage", f"{record.stage} ({record.job.replace('_', '-')}, recipe {record.recipe})"),
        ("scale", record.scale),
        ("seed", record.draw.label),
        ("configuration", f"`{record.config_hash}`, lineage `{record.lineage_hash}`"),
        ("starts from", ", ".join(_starts(record)) or "random weights"),
        ("steps", f"{record.steps:,} of {record.global_batch} samples, {record.precision}"),
        ("trained", f"{record.started}, {record.wall_seconds:,.0f} s on {accelerators}"),
        ("revision", revision),
        ("weights measured", record.selection),
    ]
    name = model.__name__
    lines = [
        "---",
        yaml.safe_dump(metadata(record, folder, model), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {paper.title}: {record.stage}, {record.scale}, {record.draw}",
        "",
        f"{title} {SCALES[record.scale]}",
        "",
        citation,
        "",
        method,
        "",
        "This is a re-implementation and not a release of the authors.",
        "",
        "## Use",
        "",
        "```python",
        f"from papers.{paper.name} import {name}",
        f'model = {name}.from_pretrained("{repo}")' if repo else f'model = {name}.from_export("{folder}")',
        usage,
        "```",
        "",
        "`papers` comes with Representation Assemble: clone its repository and run `pip install '.[hub]'` there.",
        "",
        "## What was measured",
        "",
        *_table(("metric", "value"), ((name, _number(value)) for name, value in sorted(record.metrics.items()))),
        "",
        "## How it was trained",
        "",
        *_table(("", ""), facts),
        "",
        "`record.json` holds the whole record, with the resolved configuration and the versions of all packages.",
        "",
        "## Deviations from the paper",
        "",
        *([f"- `{one['field']}`: {one['reason']}" for one in record.deviations] or ["None beyond sizes are declared."]),
        "",
        *_ours(record),
        "## Data",
        "",
        *_data(record),
        *(["", "What it starts from was made of further data, whose terms hold as well."] if _starts(record) else []),
        "",
        "## Intended use and limits",
        "",
        model.limits,
        "",
        "The code is under the Apache License 2.0. What the terms of the data above ask of those who share a model "
        "that was trained on them has to be met as well.",
    ]
    return "\n".join(lines) + "\n"


#: Parts of a configuration whose weights are none of the model's: what judges it, and what only teaches it.
_OTHERS = {"evaluation", "choice", "image_network", "tokenizer"}


def _starts(record: Record) -> list[str]:
    """Stages and released files whose weights the training began with."""
    config = record.config
    found = {str(one["stage"]) for one in record.parents.values()}
    features = ((config.get("data") or {}).get("init_args") or {}).get("text_features")
    return sorted(found | set(_files(config.get("model"))) | set(_files(features)))


def _files(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        for name, value in config.items():
            if isinstance(value, str) and (
                name in ("pretrained", "warm_start", "bert") or name.endswith("_pretrained")
            ):
                yield value.rstrip("/").rpartition("/")[2]
            elif name not in _OTHERS:
                yield from _files(value)
    elif isinstance(config, list):
        for value in config:
            yield from _files(value)


def _ours(record: Record) -> list[str]:
    if not record.ours:
        return []
    lines = [f"- `{one['field']}`: {one['value']}" for one in record.ours]
    return ["## Values that are in no source of the paper", "", *lines, ""]


def metadata(record: Record, folder: str, model: type[Any]) -> dict[str, Any]:
    """What the Hub reads of a card: license, library, task, tags, data sets, and the metrics of the record.

    Args:
        record: of the stage that trained the model.
        folder: name of the export's folder.
        model: class of the model.
    """
    world = _world(record)
    sets = [] if world else _sets(record)
    task = next((found for method, found in TASKS.items() if hasattr(model, method)), "feature-extraction")
    paper = paper_named(record.paper)
    # Weights learn from data of several terms, which the card names; only what is generated has none.
    free = world is not None and not world.credit
    found: dict[str, Any] = {"license": "apache-2.0"} if free else {"license": "other", "license_name": "see-data"}
    found |= {"library_name": LIBRARY, "pipeline_tag": task}
    found["tags"] = [LIBRARY, paper.title.lower().replace(" ", "-"), "pytorch", "safetensors", *model.embeds]
    if record.scale != "paper":
        found["tags"].append({"single": "one-card", "mini": "miniature", "smoke": "smoke-test"}[record.scale])
    if sets:
        found["datasets"] = [kind.name for kind in sets]
    metrics = [
        {"type": name, "name": name, "value": value}
        for name, value in sorted(record.metrics.items())
        if value is not None
    ]
    if metrics and record.scale != "smoke":  # a smoke test has learned nothing
        titles = [world.title] if world else [getattr(kind, "title", kind.__name__) for kind in sets]
        title = ", ".join(titles) or "unknown"
        result = {
            "task": {"type": task},
            "dataset": {"type": re.sub(r"\W+", "-", title.lower()).strip("-"), "name": title},
            "metrics": metrics,
            "source": {"name": "record.json: what the stage measured", "url": "record.json"},
        }
        found["model-index"] = [{"name": folder, "results": [result]}]
    return found


def _world(record: Record) -> Any:
    """Class of the world whose files stood in for data sets, or None."""
    world = ((record.config.get("data") or {}).get("init_args") or {}).get("world")
    return class_at(world["class_path"]) if world else None


def _sets(record: Record) -> list[Any]:
    """Classes of the data sets, each once."""
    paths = [entry["class_path"] for entry in dataset_entries(record.config.get("data"))]
    return [class_at(path) for path in dict.fromkeys(paths)]


def _data(record: Record) -> Iterator[str]:
    """Terms of the data sets, or of the world whose files stood in for them, and what was read of each."""
    world = _world(record)
    if world:
        yield (
            f"Files of the {world.title}, in the layouts of real data sets of which no sample was used. "
            f"{world.credit or 'They are generated and have no license of their own.'}"
        )
    else:
        yield from (
            f"- {getattr(kind, 'title', kind.__name__)}: {kind.license}. {getattr(kind, 'source', '')}".rstrip()
            for kind in _sets(record)
        )
    yield ""
    rows = (
        (name, str(entry.get("version", "")), f"{entry.get('samples', 0):,}", f"{entry.get('skipped', 0):,}")
        for name, entry in sorted(record.data.items())
    )
    yield from _table(("read", "version", "samples", "skipped"), rows)


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join('---' for _ in head)}|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
