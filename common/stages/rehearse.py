"""`assemble rehearse`: every stage of a paper at a large scale, on tiny data in the layouts of the real sets.

What runs is `reproduce` itself. Only two things are put under it: what `rehearsals/<paper>.py` writes in place of
real data and weights, and the overlay `configs/<paper>/rehearsal.yaml`, which is printed field by field.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import environment, write_atomically
from common.reporting import records
from common.reporting.papers import paper_named
from common.reporting.tables import Tables, load
from common.stages.paper_modules import part
from common.stages.plan import Planned, plan
from common.stages.reproduce import reproduce
from common.stages.request import Selection, finished_record

if TYPE_CHECKING:
    from rich.table import Table

DATA_FOLDER = "data"
_WRITTEN = ".written"


@dataclass(frozen=True)
class Rehearsed:
    """A rehearsed stage: why it does not count as passed (`problem`), and published metrics it lacks (`absent`)."""

    stage: str
    record: records.Record | None
    problem: str = ""
    absent: tuple[str, ...] = ()


def write_fixtures(paper: str, folder: Path, say: Callable[[str], None] = print) -> Path:
    """The tiny data sets and random weights of a paper, written unless they are there."""
    module = part(paper, "rehearsal", "cannot be rehearsed")
    version = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    root = folder / DATA_FOLDER / paper
    mark = root / _WRITTEN
    if mark.is_file() and mark.read_text(encoding="utf-8") == version:
        return root
    say(f"writing tiny data sets and random weights to {root}")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    module.write_datasets(root)
    if hasattr(module, "write_weights"):
        module.write_weights(root)
    write_atomically(mark, version)
    return root


def rehearse(
    paper: str,
    folder: Path,
    *,
    scale: str = "paper",
    stages: Sequence[str] | None = None,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> list[Rehearsed]:
    """Run every stage of a paper at a large scale on tiny data; finished ones are passed over."""
    name = paper_named(paper).name
    folder = folder.resolve()
    # A cache of its own, and no W&B run: a rehearsal measures nothing that a dashboard should hold.
    with environment(ASSEMBLE_CACHE=str(folder / "cache"), WANDB_MODE="disabled"):
        data = write_fixtures(name, folder, say)
        selection = Selection(
            scale=scale, runs=folder, data=data, stages=tuple(stages) if stages else None, rehearsal=True
        )
        planned = plan(name, selection)
        for line in describe_reductions(planned):
            say(line)
        _forget_removed_parents(planned)
        failed = reproduce(name, selection, jobs=jobs, say=say, finished=lambda _: _remove_spent(planned))
    source = load(name)
    return [_judged(item, source, failed.get((item.request.seed, item.request.stage))) for item in planned]


def _remove_spent(planned: Sequence[Planned]) -> None:
    """Remove the checkpoints of finished stages from which no unfinished one starts."""
    unfinished = [item for item in planned if finished_record(item.request) is None]
    needed = {item.request.stage for item in unfinished}
    needed |= {parent.stage for item in unfinished for parent in item.request.parents.values()}
    for item in planned:
        if item.request.stage not in needed:
            shutil.rmtree(item.request.directory / "checkpoints", ignore_errors=True)


def _forget_removed_parents(planned: Sequence[Planned]) -> None:
    """Let stages run again whose checkpoint was removed and is needed after all, since a child of theirs changed."""
    needed: set[str] = set()
    for item in reversed(planned):
        if item.done and item.request.stage not in needed:
            continue
        for parent in item.request.parents.values():
            if not parent.checkpoint(item.run.start_from).is_file():
                needed.add(parent.stage)
                (parent.directory / records.RECORD_FILE).unlink(missing_ok=True)


def describe_reductions(planned: Sequence[Planned]) -> list[str]:
    """Lines that say what the overlay changes, each with the recipes that it changes it for."""
    recipes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in planned:
        for entry in item.run.deviations:
            if not entry["reason"].startswith(records.REHEARSED):
                continue  # of the scale itself
            own = recipes[entry["field"], entry["reason"].removeprefix(records.REHEARSED)]
            if item.run.recipe not in own:
                own.append(item.run.recipe)
    every = {item.run.recipe for item in planned}
    lines = []
    for (field, change), own in sorted(recipes.items()):
        where = "all recipes" if set(own) == every else ", ".join(own)
        lines.append(f"  {records.short_name(field)}: {change}  [{where}]")
    return ["reduced for the rehearsal:", *lines] if lines else []


def _judged(item: Planned, source: Tables, failure: str | None) -> Rehearsed:
    stage, record = item.request.stage, finished_record(item.request)
    if failure is not None or record is None:
        return Rehearsed(stage, None, failure or "did not run")
    wanted = published_keys(source, item.run.scale).get(stage, set())
    absent = tuple(sorted(wanted - set(record.metrics)))
    if wanted and len(absent) == len(wanted):
        return Rehearsed(stage, record, f"measured nothing that the tables read: {', '.join(absent)}")
    if item.run.trains and not record.steps:
        return Rehearsed(stage, record, "took no step")
    return Rehearsed(stage, record, absent=absent)


def published_keys(source: Tables, scale: str) -> dict[str, set[str]]:
    """The metrics with published values that the tables of a paper read from each stage at a scale."""
    keys: dict[str, set[str]] = defaultdict(set)
    for table in source.tables:
        for row in table.rows:
            for metric in table.metrics:
                for stage in source.instances(table, row, metric, scale) if metric.published else ():
                    keys[stage].add(metric.key)
    return keys


def table_of(title: str, rehearsed: Collection[Rehearsed]) -> Table:
    """What ran, how long, with how much memory, and what came of it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Rehearsal of {title}", title_justify="left")
    for heading in ("Stage", "Steps", "Tested", "Seconds", "Peak GiB"):
        table.add_column(heading, justify="left" if heading == "Stage" else "right")
    table.add_column("Verdict", overflow="fold")
    for entry in rehearsed:
        without = f", without {', '.join(entry.absent)}" if entry.absent else ""
        verdict = Text(entry.problem or f"passed{without}", style="red" if entry.problem else "green")
        if entry.record is None:
            table.add_row(Text(entry.stage), "-", "-", "-", "-", verdict)
            continue
        record = entry.record
        null = sum(value is None for value in record.metrics.values())
        tested = f"{len(record.metrics)} metrics" + (f", {null} not finite" if null else "")
        memory = record.hardware.get("peak_memory_gib")
        table.add_row(
            Text(entry.stage), str(record.steps), tested, f"{record.wall_seconds:.0f}",
            "-" if memory is None else f"{memory:.1f}", verdict,
        )  # fmt: skip
    return table
