"""Training curves: of a run, read from its metrics file; of promoted runs, in one table."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path

from common.reporting.records import warn_of

MAX_POINTS = 200
#: Values from here on would overflow where they are drawn, and count as not finite.
LARGEST = 1e300
#: Columns of a table of curves; the last two hold numbers with spaces between them.
HEAD = ("scale", "draw", "stage", "name", "steps", "values")

#: Metric to its finite (step, value) points, sorted by step.
Curves = dict[str, list[tuple[float, float]]]


def read_curves(path: Path) -> Curves:
    """The curves of a run's `metrics.csv` as they are drawn; see `thinned`."""
    return thinned(read_points(path))


def read_points(path: Path) -> Curves:
    """Every point of a run's `metrics.csv`.

    Args:
        path: file with the columns `step`, `name` and `value`; or with a column for each metric, a row of which holds
            the values logged at one time, the rest of it being empty.

    Returns:
        Nothing for a file that does not exist, or, with a warning, for one that is damaged.
    """
    if not path.is_file():
        return {}
    found: Curves = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            head = next(reader, [])
            long = sorted(head) == ["name", "step", "value"]
            for row in reader:
                named = dict(zip(head, row))
                step = _number(named.get("step"))
                if step is None:
                    continue
                entries = {named.get("name", ""): named.get("value", "")} if long else named
                for name, text in entries.items():
                    value = _number(text)
                    if name and name not in ("step", "epoch") and value is not None:
                        found.setdefault(name, []).append((step, value))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        warn_of(f"{path} holds no curves that can be read ({error})")
        return {}
    return {name: sorted(points, key=itemgetter(0)) for name, points in found.items()}


def read_table(path: Path) -> dict[tuple[str, str, str], Curves]:
    """The curves of a table, by scale, draw and stage.

    Returns:
        Nothing for a table that does not exist, or, with a warning, for one that is damaged.
    """
    found: dict[tuple[str, str, str], Curves] = {}
    if not path.is_file():
        return found
    try:
        # A row of many points is longer than what csv takes for a cell by default.
        csv.field_size_limit(2**31 - 1)
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for scale, draw, stage, name, steps, values in list(csv.reader(file))[1:]:
                points = zip(map(float, steps.split()), map(float, values.split()), strict=True)
                found.setdefault((scale, draw, stage), {})[name] = list(points)
    except (csv.Error, ValueError, OSError, EOFError, zlib.error) as error:
        warn_of(f"{path} holds no curves that can be read ({error})")
        return {}
    return found


def table_of(curves: Mapping[tuple[str, str, str], Curves]) -> bytes:
    """A compressed table of curves, with five digits of each value.

    Each draw is compressed by itself, so that git keeps only the difference when one is added.
    """
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
    """Per curve of several runs, the least and the greatest value at every step: (step, least, greatest)."""
    values: dict[str, dict[float, list[float]]] = {}
    for curves in runs:
        for metric, points in thinned(curves).items():
            for x, y in points:
                values.setdefault(metric, {}).setdefault(x, []).append(y)
    return {metric: [(x, min(at[x]), max(at[x])) for x in sorted(at)] for metric, at in values.items()}


def summaries(path: Path) -> dict[str, float]:
    """Last, smallest and largest value of every curve of a run's `metrics.csv`.

    Returns:
        `<metric>` to the last value, `<metric>:min` and `<metric>:max` where there are several.
    """
    found: dict[str, float] = {}
    for name, points in read_points(path).items():
        values = [value for _, value in points]
        found[name] = values[-1]
        if len(values) > 1:
            found |= {f"{name}:min": min(values), f"{name}:max": max(values)}
    return found


def importance(metric: str) -> tuple[bool, bool, bool, str]:
    """Sorts metrics: losses first, of these the whole one; what validation data gave before what training data gave."""
    return "loss" not in metric, metric.rpartition("/")[2] != "loss", not metric.startswith("val"), metric


def thinned(curves: Curves) -> Curves:
    """Curves to draw: those of two points or more, with at most `MAX_POINTS`."""
    return {name: _means(points) for name, points in curves.items() if len(points) > 1}


def _means(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of equal groups of neighboring points, so that no peak of noise is picked by chance."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if abs(value) < LARGEST else None  # also without what is not a number
