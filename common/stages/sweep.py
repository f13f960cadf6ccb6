"""A sweep: one stage with every combination of some values, over seeds, run by the scheduler of stages, in a table."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.errors import StageError, nearest
from common.reporting.tables import entries, load
from common.stages.configuration import check_arguments, take_switches
from common.stages.plan import Planned, Selection, plan, state_of
from common.stages.run import StageRequest, finished_record
from common.stages.single import find_request

if TYPE_CHECKING:
    from rich.table import Table

MOST_METRICS = 4


@dataclass(frozen=True)
class Trial:
    """One combination: the values by field, and its stage for each seed."""

    values: tuple[tuple[str, str], ...]
    requests: tuple[StageRequest, ...]

    def metrics(self) -> dict[str, list[float]]:
        """Finite values of every metric over the seeds that are done."""
        found: dict[str, list[float]] = {}
        for request in self.requests:
            record = finished_record(request, request.lineage_hash())
            for name, value in (record.metrics if record else {}).items():
                if value is not None:
                    found.setdefault(name, []).append(value)
        return found


def combinations(arguments: Sequence[str]) -> list[tuple[tuple[str, str], ...]]:
    """Every combination of values of the fields that are given as `--field value value ...` or `--field=value`.

    Raises:
        StageError: no field, a field without a value, or one that is given twice.
    """
    fields: dict[str, list[str]] = {}
    last = ""
    for argument in arguments:
        if argument.startswith("--"):
            last, equals, value = argument[2:].partition("=")
            if last in fields:
                raise StageError(f"--{last} is given twice; write all of its values after one")
            fields[last] = [value] if equals else []
        elif last:
            fields[last].append(argument)
        else:
            raise StageError(f"unexpected {argument!r}: values stand behind the field that takes them")
    if not fields:
        raise StageError("name at least one field and its values, such as --data.batch_size 32 64")
    for name, values in fields.items():
        if not values:
            raise StageError(f"--{name} needs values, such as --{name} 0.1 0.2")
    return list(
        itertools.product(*([(name, value) for value in dict.fromkeys(values)] for name, values in fields.items()))
    )


def plan_sweep(name: str, selection: Selection, arguments: Sequence[str]) -> tuple[list[Planned], list[Trial]]:
    """What a sweep runs, parents first, and its trials.

    A trial has the folder that `assemble fit` with the same overrides has, so what is done is not done again.

    Args:
        name: `<paper>/<stage or recipe>`.
        selection: scale, seeds, machine and folders.
        arguments: fields with their values, see `combinations`.

    Raises:
        ConfigurationError, StageError: a name, a field or a value is wrong; nothing was run.
    """
    trials = [
        Trial(
            values,
            tuple(
                find_request(name, replace(selection, seeds=(seed,)), [f"--{field}={value}" for field, value in values])
                for seed in selection.seeds
            ),
        )
        for values in combinations(arguments)
    ]
    for trial in trials:
        run = trial.requests[0].configuration()
        check_arguments(take_switches(run.config)[1], run.layers)
    requests = [request for trial in trials for request in trial.requests]
    parents = dict.fromkeys(parent.stage for request in requests for parent in request.parents.values())
    planned = plan(requests[0].paper, replace(selection, stages=tuple(parents))) if parents else []
    for request in requests:
        run = request.configuration()
        lineage = request.lineage_hash(run)
        planned.append(Planned(request, run, lineage, *state_of(request, lineage)))
    return planned, trials


def chosen_metric(trials: Sequence[Trial], metric: str | None) -> tuple[str, bool]:
    """The metric that trials are sorted by, and whether a larger one is better.

    Args:
        trials: trials, some of them done.
        metric: one that was asked for; else the first that tables show of this stage, or the first of all.

    Raises:
        StageError: no trial has measured it.
    """
    request = trials[0].requests[0]
    shown = entries(load(request.paper), request.stage.partition("+")[0], request.scale)
    better = {m.key: m.better != "down" for _, _, m in reversed(shown)}
    known = list(dict.fromkeys(name for trial in trials for name in trial.metrics()))
    if metric is None:
        metric = next((m.key for _, _, m in shown if m.key in known), known[0] if known else None)
    if metric not in known:
        raise StageError(f"--sort {metric}: no trial measured it; {nearest(str(metric), known)}")
    return metric, better.get(metric, "loss" not in metric)


def result(trials: Sequence[Trial], metric: str, larger: bool) -> Table:
    """The trials for the terminal, the best first: mean and standard deviation over seeds of a few metrics."""
    from rich.markup import escape
    from rich.table import Table

    measured = [(trial, trial.metrics()) for trial in trials]
    others = dict.fromkeys(name for _, found in measured for name in found if name != metric)
    metrics = [metric, *list(others)[: MOST_METRICS - 1]]
    names = [field for field, _ in trials[0].values]
    table = Table(*[_short(name, names) for name in names], *metrics, "seeds", "stage", box=None, pad_edge=False)
    done = [(trial, found) for trial, found in measured if found.get(metric)]
    done.sort(key=lambda pair: statistics.fmean(pair[1][metric]), reverse=larger)
    for trial, found in done + [pair for pair in measured if not pair[1].get(metric)]:
        cells = [_told(found.get(name, [])) for name in metrics]
        seeds = f"{len(found.get(metric, []))} of {len(trial.requests)}"
        table.add_row(*[escape(value) for _, value in trial.values], *cells, seeds, trial.requests[0].stage)
    return table


def _short(field: str, fields: Sequence[str]) -> str:
    """The last part of a field's name, or all of it where another one has the same."""
    last = field.rpartition(".")[2]
    return field if sum(other.rpartition(".")[2] == last for other in fields) > 1 else last


def _told(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean
