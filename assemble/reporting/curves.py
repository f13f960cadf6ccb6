"""Read training curves from a run's metrics file, or from the table of promoted runs."""

from __future__ import annotations

import csv
import gzip
import io
import math
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

from assemble.reporting.records import RecordError, warn_of
from common.files import MOST_BYTES, open_regular, parsing

MAX_POINTS = 200
#: Larger values count as infinite, since they would overflow when drawn.
LARGEST = 1e300
#: Columns of a table of curves. The last two hold numbers separated by spaces.
HEAD = ("scale", "draw", "stage", "name", "steps", "values")

#: Metric to its finite (step, value) points, sorted by step.
Curves = dict[str, list[tuple[float, float]]]


def read_points(path: Path) -> Curves:
    """Read all points of a run's `metrics.csv`. A missing file has no points; a damaged one causes a warning."""
    curves: Curves = {}
    if not path.exists():
        return curves
    try:
        with parsing(path, RecordError), open_regular(path, "r", MOST_BYTES, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                name, step, value = row.get("name"), _number(row.get("step")), _number(row.get("value"))
                if name and name != "epoch" and step is not None and value is not None:
                    curves.setdefault(name, []).append((step, value))
    except RecordError as error:
        warn_of(f"skipped the curves of a run: {error}")
        return {}
    return {name: sorted(points, key=itemgetter(0)) for name, points in curves.items()}


def read_table(path: Path) -> dict[tuple[str, str, str], Curves]:
    """Read the curves of a table file, by scale, draw and stage. A missing file has no curves."""
    curves: dict[tuple[str, str, str], Curves] = {}
    if not path.exists():
        return curves
    csv.field_size_limit(sys.maxsize)  # A curve with many points exceeds the default limit.
    with (
        parsing(path, RecordError),
        open_regular(path) as packed,
        gzip.open(packed, "rt", encoding="utf-8", newline="") as file,
    ):
        for scale, draw, stage, name, steps, values in list(csv.reader(file))[1:]:
            points = zip(map(float, steps.split()), map(float, values.split()), strict=True)
            curves.setdefault((scale, draw, stage), {})[name] = list(points)
    return curves


def table_of(curves: Mapping[tuple[str, str, str], Curves]) -> bytes:
    """Compress curves into a table with five digits per value. One stream per draw keeps git's diffs small."""
    parts: dict[tuple[str, str], list[tuple[str, ...]]] = {("", ""): [HEAD]}
    for (scale, draw, stage), metrics in sorted(curves.items()):
        rows = parts.setdefault((scale, draw), [])
        for name, points in sorted(metrics.items()):
            steps, values = (" ".join(map(form, part)) for form, part in zip((_STEP, _VALUE), zip(*points)))
            rows.append((scale, draw, stage, name, steps, values))
    return b"".join(gzip.compress(_rows(rows), mtime=0) for rows in parts.values())


_STEP, _VALUE = "{:.15g}".format, "{:.5g}".format


def _rows(rows: Iterable[tuple[str, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def band_of(runs: Iterable[Curves]) -> dict[str, list[tuple[float, float, float]]]:
    """Return the range of each curve over several runs, as (step, lowest, highest)."""
    values: dict[str, dict[float, list[float]]] = {}
    for curves in runs:
        for metric, points in thinned(curves).items():
            for x, y in points:
                values.setdefault(metric, {}).setdefault(x, []).append(y)
    return {metric: [(x, min(at[x]), max(at[x])) for x in sorted(at)] for metric, at in values.items()}


def summaries(path: Path) -> dict[str, float]:
    """Summarize a run's `metrics.csv`: `<metric>` is the last value. If it has several, add `:min` and `:max`."""
    extremes: dict[str, float] = {}
    for name, points in read_points(path).items():
        values = [value for _, value in points]
        extremes[name] = values[-1]
        if len(values) > 1:
            extremes |= {f"{name}:min": min(values), f"{name}:max": max(values)}
    return extremes


def importance(metric: str) -> tuple[bool, bool, bool, str]:
    """Return a sort key for metrics: losses first, the total loss before its parts, validation before training."""
    return "loss" not in metric, metric.rpartition("/")[2] != "loss", not metric.startswith("val"), metric


def thinned(curves: Curves) -> Curves:
    """Return the curves with two or more points, reduced to at most `MAX_POINTS` each."""
    return {name: _means(points) for name, points in curves.items() if len(points) > 1}


def _means(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average equal groups of neighboring points. Picking single points could show a noise peak."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _number(text: str | None) -> float | None:
    with suppress(ValueError, TypeError):
        if abs(value := float(text)) < LARGEST:  # type: ignore[arg-type]
            return value
    return None
