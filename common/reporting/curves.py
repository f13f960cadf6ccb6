"""The training curves of a run, read from its metrics file."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

from common.reporting.records import warn_of

MAX_POINTS = 200
LARGEST = 1e300
"""Values from here on would overflow where they are drawn, and count as not finite."""


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read a run's `metrics.csv`.

    Args:
        path: file with the columns `step`, `name` and `value`; or with a column for each metric, a row of which holds
            the values logged at one time, the rest of it being empty; compressed where its name ends in `.gz`.

    Returns:
        Metric to (step, value) points, sorted by step, thinned to at most `MAX_POINTS`. Metrics with fewer than
        two finite points are left out; so is a file that does not exist, or that is damaged, which is said.
    """
    return {name: _thinned(points) for name, points in _points(path).items() if len(points) > 1}


def band_of(paths: Iterable[Path]) -> dict[str, list[tuple[float, float, float]]]:
    """Per curve of several runs' files, the least and the greatest value at every step: (step, least, greatest)."""
    values: dict[str, dict[float, list[float]]] = {}
    for path in paths:
        for metric, points in read_curves(path).items():
            for x, y in points:
                values.setdefault(metric, {}).setdefault(x, []).append(y)
    return {metric: [(x, min(at[x]), max(at[x])) for x in sorted(at)] for metric, at in values.items()}


def summaries(path: Path) -> dict[str, float]:
    """Last, smallest and largest value of every curve of a run's `metrics.csv`.

    Returns:
        `<metric>` to the last value, `<metric>:min` and `<metric>:max` where there are several; empty where there is
        no file that can be read.
    """
    found: dict[str, float] = {}
    for name, points in _points(path).items():
        values = [value for _, value in points]
        found[name] = values[-1]
        if len(values) > 1:
            found |= {f"{name}:min": min(values), f"{name}:max": max(values)}
    return found


def _points(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Every finite point of a file, sorted by step; nothing of one that does not exist, or, with a word, is damaged."""
    if not path.is_file():
        return {}
    try:
        return _read(path)
    except (csv.Error, UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        warn_of(f"{path} holds no curves that can be read ({error})")
        return {}


def _read(path: Path) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
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
    return {name: sorted(points, key=itemgetter(0)) for name, points in found.items()}


def importance(metric: str) -> tuple[bool, bool, bool, str]:
    """Sorts metrics: losses first, of these the whole one; what validation data gave before what training data gave."""
    return "loss" not in metric, metric.rpartition("/")[2] != "loss", not metric.startswith("val"), metric


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if abs(value) < LARGEST else None  # also without what is not a number


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of equal groups of neighboring points, so that no peak of noise is picked by chance."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
