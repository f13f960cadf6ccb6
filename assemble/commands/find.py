"""The commands `assemble list` and `assemble show`, which don't import torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from assemble.commands.parsing import PaperName, Runs, Scale, StageName
from assemble.reporting.papers import (
    Paper,
    existing_papers,
    paper_named,
    project_root,
    runs_root,
)
from assemble.reporting.progress import duration
from common import files
from common.errors import printable

if TYPE_CHECKING:
    from assemble.reporting.tables import StageInstance


def list_(paper: PaperName | None = None, *, scale: Scale = "mini", runs: Runs = None) -> int:
    """List the papers, or the tables, rows, stages and recipes of one paper.

    For each stage, shows how long it takes on this machine and which runs exist.
    """
    if paper is None:
        _list_papers()
    else:
        _list_paper(paper_named(paper), scale, runs or runs_root())
    return 0


def _list_papers() -> None:
    papers = existing_papers()
    print_rows(("paper", "title", "what it does"), [(paper.short, paper.title, paper.about) for paper in papers])
    print(f"`assemble list {papers[0].short}` shows a paper's tables, rows, stages and recipes")


def _list_paper(paper: Paper, scale: str, runs: Path) -> None:
    from assemble.reporting.tables import expand, load
    from assemble.stages.recipes import recipes_of

    source = load(paper.name)
    print(f"{paper.title}: tables; at scales in brackets, run with --tables, --rows or --everything")
    rows = []
    for table in source.tables:
        scales = " ".join(f"({name})" if name in table.by_request else name for name in table.scales)
        rows.append((table.id, scales, table.title, " ".join(m.id for m in table.metrics if not m.hidden)))
    print_rows(("id", "scales", "title", "metrics"), rows)

    print(
        f"\nrows at {scale}; select one with --rows LABEL or --rows MODEL. Rows of a table in brackets only run if you "
        "select them."
    )
    models: dict[tuple[str, str], list[str]] = {}
    for table in source.tables:
        for row in table.rows:
            if (row.model or row.untrained) and scale in table.scales and scale in row.scales:
                shown = f"({table.id})" if table.made_by_request(row, scale) else table.id
                models.setdefault((row.label, row.model or "untrained"), []).append(shown)
    print_rows(("label", "model", "tables"), [(*key, " ".join(ids)) for key, ids in models.items()])

    print(f"\nstages at {scale} (--stages, assemble fit {paper.short}/STAGE)")
    _print_stages(paper, scale, runs, expand(source, scale))

    print(f"\nrecipes (configs/{paper.name}; `assemble show {paper.short}/RECIPE`)")
    print_rows(("recipe", "description"), [(name, _about(paper.name, name)) for name in recipes_of(paper.name)])


def _print_stages(paper: Paper, scale: str, runs: Path, instances: Sequence[StageInstance]) -> None:
    from assemble.reporting.records import expected_seconds, find
    from assemble.reporting.results import find_promoted

    here, promoted = find(runs, paper.name, scale), find_promoted(paper.name, scale)
    seconds = expected_seconds([stage.id for stage in instances], here, promoted)
    rows = []
    for stage in instances:
        parents = " ".join(dict.fromkeys(stage.parents.values()))
        time = duration(seconds[stage.id]) if stage.id in seconds else "-"
        draws = (
            ",".join(record.draw.folder.removeprefix("seed") for record in records if record.stage == stage.id) or "-"
            for records in (here, promoted)
        )
        rows.append((stage.id, stage.job, stage.recipe, parents, time, *draws))
    print_rows(("stage", "job", "recipe", "starts from", "time", "draws here", "promoted"), rows)


def show(name: StageName, *, scale: Scale = "mini", runs: Runs = None) -> int:
    """Describe a stage or recipe without running it.

    Lists the merged files, the stages it starts from, the cells it fills, the recipe's stages and their runs, the
    deviations of the scale, and the values that the paper's sources don't give.
    """
    from assemble.reporting.records import short_name
    from assemble.reporting.tables import entries, expand, load
    from assemble.stages.request import Selection, find_request

    request = find_request(name, Selection(scale=scale, runs=runs or runs_root()))
    run, paper = request.configuration, paper_named(request.paper)
    print(f"{paper.title}, {request.stage} at scale {request.scale}: {_about(request.paper, request.recipe)}")
    print(f"\nrecipe: configs/{request.paper}/{request.recipe}.yaml, job: {request.job}")
    print(f"classes: {run.config['model']['class_path']}, {run.config['data']['class_path']}")
    print(f"merged from: {run.describe()}")
    for field, parent in request.parents.items():
        print(f"starts from: {parent.stage} ({short_name(field)})")
    if not run.trains:
        print("does not train, only tests")
    for table, row, metric in entries(load(request.paper), request.stage, request.scale):
        print(f"fills: table {table.id}, row {row.label}, {metric.label}")
    using = [instance for instance in expand(request.paper, request.scale) if instance.recipe == request.recipe]
    print(f"\nstages of this recipe: {len(using) or f'none at {request.scale}'}")
    if using:
        _print_stages(paper, request.scale, runs or runs_root(), using)
    print(f"finished runs, also with overrides: assemble runs {paper.short}")
    print("\ndeviations of this scale:" if run.deviations else "\nno deviations except sizes")
    for deviation in run.deviations:
        print(f"  {short_name(deviation['field'])}: {deviation['reason']}")
    if ours := run.describe_ours():
        print(f"values that the paper's sources don't give, as set here: {ours}")
    print(f"\n`assemble fit {name} --scale {request.scale} --print_config` shows all fields that the files set")
    return 0


def _about(paper: str, recipe: str) -> str:
    """Return the comment at the top of a recipe's file."""
    lines = (project_root() / "configs" / paper / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


def print_rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose cells are plain text."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(escape(printable(head)), overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    files.console().print(table)
