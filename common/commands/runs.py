"""The command `assemble runs`: the runs in a folder, in the shell. No torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import files
from common.errors import ReportingError
from common.reporting.papers import example_stage, names_of_papers, paper_named, runs_root

if TYPE_CHECKING:
    from common.reporting.runs import Run

COLUMNS = ("run", "state", "started", "minutes", "overrides", "measured")


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to a command line."""
    command = commands.add_parser(
        "runs",
        help="the runs here: list, filter, sort, and what differs between two",
        description="Every run in the folder of runs, finished or not, from the files that runs write. A field is a "
        "metric (test/top1), the last, smallest or largest value of a curve (train/loss, train/loss:min, "
        "train/loss:max), a field of the configuration (model.loss.temperature) or one of those that `--fields` names.",
        epilog="Examples: assemble runs --where scale=mini 'test/top1>80' --sort test/top1 --reverse; "
        "assemble runs --columns run model.loss.temperature test/top1; "
        f"assemble runs --diff seed0/{(stage := example_stage().partition('/')[2])} seed1/{stage}",
    )
    command.add_argument("papers", nargs="*", metavar="paper", help=f"{names_of_papers()}; default: all")
    command.add_argument(
        "--where", nargs="+", action="extend", default=[], metavar="CONDITION",
        help="FIELD=VALUE, != < <= > >= or ~ (contains); all must hold",
    )  # fmt: skip
    command.add_argument("--columns", nargs="+", metavar="FIELD", help=f"default: {' '.join(COLUMNS)}")
    command.add_argument("--sort", metavar="FIELD", help="by this field; runs without it come last")
    command.add_argument("--reverse", action="store_true", help="the largest first")
    command.add_argument("--limit", type=int, help="show so many")
    command.add_argument("--fields", action="store_true", help="name the fields that these runs have")
    command.add_argument(
        "--diff", nargs=2, metavar="RUN", help="what differs between two: paper/scale/seed0/stage, or the end of it"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--runs", type=Path, default=runs_root(), help="folder of the runs; default: runs")
    command.set_defaults(func=runs_command)


def runs_command(arguments: argparse.Namespace) -> int:
    """Print the runs, their fields, or what differs between two."""
    from common.reporting import runs as reading

    if not arguments.runs.is_dir():
        raise ReportingError(f"--runs {arguments.runs}: no such folder; a first run makes it")
    if arguments.limit is not None and arguments.limit < 1:
        raise ReportingError(f"--limit must be at least 1, got {arguments.limit}")
    found = reading.find_runs(arguments.runs, [paper_named(name).name for name in arguments.papers])
    if arguments.diff:
        first, second = reading.named_runs(found, arguments.diff)
        return _diff(first, second, arguments.json)
    conditions = [reading.parse_condition(text) for text in arguments.where]
    if found:
        reading.check_fields(found, [field for field, _, _ in conditions], "--where")
        reading.check_fields(found, arguments.columns or [], "--columns")
        reading.check_fields(found, [arguments.sort] if arguments.sort else [], "--sort")
    kept = [run for run in found if all(reading.matches(run, *condition) for condition in conditions)]
    if arguments.sort or arguments.reverse:
        kept = reading.sort_runs(kept, arguments.sort or "started", arguments.reverse)
    shown = kept[: arguments.limit]
    if arguments.fields:
        print("\n".join(reading.field_names(kept)))
    elif arguments.json:
        _print_json([_described(run, arguments.columns) for run in shown])
    else:
        _table(shown, arguments.columns or COLUMNS)
        hidden = f", {len(kept) - len(shown)} more with another --limit" if len(shown) < len(kept) else ""
        print(f"{len(shown)} of {len(found)} runs in {arguments.runs}{hidden}")
    return 0


def _described(run: Run, columns: Sequence[str] | None) -> dict[str, object]:
    if columns:
        return {name: run.value(name) for name in columns}
    kept = {name: value for name, value in run.fields.items() if name not in run.config and "/" not in name}
    metrics = run.record.metrics if run.record else {}
    return {**kept, "folder": str(run.folder), "metrics": metrics, "curves": run.curves, "config": run.config}


def _table(runs: Sequence[Run], columns: Sequence[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from common.reporting.runs import text_of

    # What no run has to say takes no room, unless it was asked for.
    heads = [
        name for name in columns if columns is not COLUMNS or any(run.value(name) not in (None, "") for run in runs)
    ]
    table = Table(*map(escape, heads), box=None, pad_edge=False, header_style="bold")
    for run in runs:
        texts = {name: text_of(run.value(name)) for name in heads}
        if "progress" not in heads and "state" in heads and run.value("progress"):
            texts["state"] += f" ({run.value('progress')})"
        table.add_row(*(escape(texts[name]) for name in heads))
    files.console().print(table)


def _diff(first: Run, second: Run, as_json: bool) -> int:
    """Print what differs between two runs: the configuration, and every metric."""
    from rich.markup import escape
    from rich.table import Table

    from common.reporting.runs import config_differences, metric_differences, text_of

    config, metrics = config_differences(first, second), metric_differences(first, second)
    if as_json:
        _print_json(
            {
                "runs": [first.name, second.name],
                "config": [
                    {"field": d.field, "values": [d.first, d.second], "changes_result": d.counts} for d in config
                ],
                "metrics": [{"field": d.field, "values": [d.first, d.second]} for d in metrics],
            }
        )
        return 0
    console = files.console()
    for title, rows in (
        ("configuration", [d for d in config if d.counts]),
        ("where and on what it ran, no part of the hash", [d for d in config if not d.counts]),
    ):
        table = Table("field", "first", "second", box=None, pad_edge=False, header_style="bold")
        for d in rows:
            table.add_row(*(escape(text) for text in (d.field, text_of(d.first), text_of(d.second))))
        print(f"{title}: {'' if rows else 'nothing differs'}")
        if rows:
            console.print(table)
            print()
    table = Table("metric", "first", "second", "difference", box=None, pad_edge=False, header_style="bold")
    for d in metrics:
        both = isinstance(d.first, int | float) and isinstance(d.second, int | float)
        change = f"{d.second - d.first:+.5g}" if both else ""
        table.add_row(*(escape(text) for text in (d.field, text_of(d.first), text_of(d.second), change)))
    print("metrics:" if metrics else "metrics: none yet")
    if metrics:
        console.print(table)
    print(f"first: {first.name}\nsecond: {second.name}")
    return 0


def _print_json(content: object) -> None:
    json.dump(content, sys.stdout, indent=1, ensure_ascii=False)
    print()
