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
    where: Annotated[Sequence[str], "FIELD=VALUE, != < <= > >= or ~ (contains); all must hold"] = (),
    columns: Annotated[Sequence[str], f"default: {' '.join(COLUMNS)}"] = (),
    sort: Annotated[str | None, "by this field; runs without it come last"] = None,
    reverse: Annotated[bool, "largest first"] = False,
    fields: Annotated[bool, "list the fields of these runs"] = False,
    diff: Annotated[
        tuple[str, str] | None, "compare two runs, each given as paper/scale/seed0/stage or the end of such a path"
    ] = None,
    json_: Annotated[bool, "print JSON"] = False,
    runs: ExistingRuns = None,
) -> int:
    """List, filter and sort finished and unfinished runs, or compare two.

    A field is a metric (test/top1), the last, smallest or largest value of a curve (train/loss, train/loss:min,
    train/loss:max), a field of the configuration (model.loss.temperature) or another one that --fields lists.

    Examples: assemble runs --where scale=mini 'test/top1>80' --sort test/top1 --reverse; assemble runs --columns run
    model.loss.temperature test/top1; assemble runs --diff seed0/STAGE seed1/STAGE
    """
    from assemble.reporting import runs as reading

    folder = runs or runs_root()
    found = reading.find_runs(folder, [paper_named(name).name for name in papers])
    if diff and (json_ or where or columns or sort or reverse or fields):
        raise StageError("--diff prints tables of two runs: leave out the other options")
    if diff:
        first, second = reading.named_runs(found, diff)
        return _diff(first, second)
    conditions = [reading.parse_condition(text) for text in where]
    if found:
        reading.check_fields(found, [field for field, _, _ in conditions], "--where")
        reading.check_fields(found, columns, "--columns")
        reading.check_fields(found, [sort] if sort else [], "--sort")
    kept = [run for run in found if all(reading.matches(run, *condition) for condition in conditions)]
    if sort or reverse:
        kept = reading.sort_runs(kept, sort or "started", reverse)
    if fields:
        print("\n".join(reading.field_names(kept)))
    elif json_:
        json.dump([_described(run, columns) for run in kept], sys.stdout, indent=1, ensure_ascii=False, default=str)
        print()
    else:
        _shown(kept, columns or COLUMNS)
        print("\n".join([f"{len(kept)} of {len(found)} runs in {folder}", *reading.unmet(found, conditions)]))
    return 0


def _described(run: Run, columns: Sequence[str] | None) -> dict[str, object]:
    if columns:
        return {name: run.value(name) for name in columns}
    kept = {name: value for name, value in run.fields.items() if name not in run.config and "/" not in name}
    metrics = run.record.metrics if run.record else {}
    return {**kept, "folder": str(run.folder), "metrics": metrics, "curves": run.curves, "config": run.config}


def _shown(runs: Sequence[Run], columns: Sequence[str]) -> None:
    from assemble.reporting.runs import text_of

    # Hide empty columns unless the user asked for them.
    heads = [
        name for name in columns if columns is not COLUMNS or any(run.value(name) not in (None, "") for run in runs)
    ]
    rows = []
    for run in runs:
        texts = {name: text_of(run.value(name)) for name in heads}
        if "progress" not in heads and "state" in heads and run.value("progress"):
            texts["state"] += f" ({run.value('progress')})"
        rows.append([*texts.values()])
    print_rows(heads, rows)


def _diff(first: Run, second: Run) -> int:
    """Print where two configurations differ, and every metric."""
    from assemble.reporting.runs import config_differences, counts, metric_differences, text_of

    config, metrics = config_differences(first, second), metric_differences(first, second)
    for title, differing in (
        ("configuration", [d for d in config if counts(d[0])]),
        ("machine and paths, not part of the hash", [d for d in config if not counts(d[0])]),
    ):
        print(f"{title}: {'' if differing else 'nothing differs'}")
        if differing:
            rows = [[name, text_of(one), text_of(other)] for name, one, other in differing]
            print_rows(("field", "first", "second"), rows)
            print()
    print("metrics:" if metrics else "metrics: none yet")
    rows = []
    for name, one, other in metrics:
        both = isinstance(one, int | float) and isinstance(other, int | float)
        rows.append([name, text_of(one), text_of(other), f"{other - one:+.5g}" if both else ""])
    if rows:
        print_rows(("metric", "first", "second", "difference"), rows)
    print(f"first: {first.name}\nsecond: {second.name}")
    return 0
