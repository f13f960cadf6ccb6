"""The command `assemble runs`, which doesn't import torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from assemble.commands.find import print_rows
from assemble.commands.parsing import ExistingRuns, PaperNames
from assemble.reporting.papers import paper_named, runs_root
from common.errors import StageError

if TYPE_CHECKING:
    from assemble.reporting.runs import Run

COLUMNS = ("run", "state", "started", "minutes", "overrides", "measured")


def runs(
    papers: PaperNames = (),
    *,
    diff: Annotated[
        tuple[str, str] | None, "compare two runs, each given as paper/scale/seed0/stage or the end of such a path"
    ] = None,
    json_: Annotated[bool, "print everything as JSON: configuration, metrics, curves"] = False,
    runs: ExistingRuns = None,
) -> int:
    """List all runs with their state and main metrics, or compare two runs.

    To filter and sort, use --json with jq, or W&B. Example: assemble runs --diff seed0/STAGE seed1/STAGE
    """
    from assemble.reporting.runs import find_runs, named_runs

    folder = runs or runs_root()
    listed = find_runs(folder, [paper_named(name).name for name in papers])
    if diff and json_:
        raise StageError("--diff prints tables of two runs: leave out --json")
    if diff:
        first, second = named_runs(listed, diff)
        return _diff(first, second)
    if json_:
        json.dump([_described(run) for run in listed], sys.stdout, indent=1, ensure_ascii=False, default=str)
        print()
    else:
        _show(listed)
        print(f"{len(listed)} runs in {folder}")
    return 0


def _described(run: Run) -> dict[str, object]:
    metrics = run.record.metrics if run.record else {}
    return {**run.fields, "folder": str(run.folder), "metrics": metrics, "curves": run.curves, "config": run.config}


def _show(runs: Sequence[Run]) -> None:
    """Print a table with one row per run. Omit empty columns."""
    from assemble.reporting.runs import text_of

    heads = [name for name in COLUMNS if any(run.fields.get(name) not in (None, "") for run in runs)]
    rows = []
    for run in runs:
        texts = {name: text_of(run.fields.get(name)) for name in heads}
        if run.fields.get("progress"):
            texts["state"] += f" ({run.fields['progress']})"
        rows.append([*texts.values()])
    print_rows(heads, rows)


def _diff(first: Run, second: Run) -> int:
    """Print the fields in which two runs' configurations differ, and every metric of both runs."""
    from assemble.reporting.runs import config_differences, counts, metric_differences, text_of

    config, metrics = config_differences(first, second), metric_differences(first, second)
    for title, differing in (
        ("configuration", [d for d in config if counts(d[0])]),
        ("machine and paths, not part of the hash", [d for d in config if not counts(d[0])]),
    ):
        print(f"{title}: {'' if differing else 'nothing differs'}")
        if differing:
            rows = [[name, text_of(before), text_of(after)] for name, before, after in differing]
            print_rows(("field", "first", "second"), rows)
            print()
    print("metrics:" if metrics else "metrics: none yet")
    rows = []
    for name, before, after in metrics:
        both = isinstance(before, int | float) and isinstance(after, int | float)
        rows.append([name, text_of(before), text_of(after), f"{after - before:+.5g}" if both else ""])
    if rows:
        print_rows(("metric", "first", "second", "difference"), rows)
    print(f"first: {first.name}\nsecond: {second.name}")
    return 0
