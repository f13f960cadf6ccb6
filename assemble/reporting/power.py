"""Estimate how many paired runs separate two rows of a table, by the interval that claims use."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import chdtri, nctdtr, nctdtrinc, stdtrit

from assemble.reporting.aggregate import TableResult
from assemble.reporting.claims import CONFIDENCE, seed_means
from assemble.reporting.tables import Metric, Row, part_named
from common.errors import ReportingError, nearest

#: Probability of separating the rows.
POWER = 0.8
#: Largest number of runs to consider.
MOST_RUNS = 10_000


@dataclass(frozen=True)
class Paired:
    """A metric of two rows, and the rows' difference for each seed that both have. Roundings are averaged."""

    result: TableResult
    metric: Metric
    row: Row
    over: Row

    @property
    def differences(self) -> list[float]:
        mine, theirs = (self.result.cells[row.label, self.metric.id].values for row in (self.row, self.over))
        differences = {draw: mine[draw] - theirs[draw] for draw in mine.keys() & theirs.keys()}
        return seed_means(differences)

    @property
    def stages(self) -> list[str]:
        return [
            stage for row in (self.row, self.over) for stage in self.result.cells[row.label, self.metric.id].instances
        ]


def find_pair(results: Sequence[TableResult], row: str, over: str, metric: str) -> Paired:
    """Find two rows (by label or model) and a metric (by id or label) in the recorded results."""
    for name in (row, over):
        if not any(part_named(name, result.rows, "label", "model") for result in results):
            labels = {line.label for result in results for line in result.rows}
            raise ReportingError(f"unknown row {name!r}: {nearest(name, labels)}")
    pairs, metrics = [], set()
    for result in results:
        mine, theirs = (part_named(name, result.rows, "label", "model") for name in (row, over))
        if mine and theirs:
            metrics |= {column.id for column in result.table.metrics}
            if chosen := part_named(metric, result.table.metrics, "id", "label", "key"):
                pairs.append(Paired(result, chosen, mine, theirs))
    if not pairs:
        raise ReportingError(f"no table has {metric!r} of {row} and {over}: {nearest(metric, metrics)}")
    # Several tables may share a cell.
    recorded = {(*pair.stages, pair.metric.key): pair for pair in reversed(pairs) if len(pair.differences) > 1}
    if not recorded:
        raise ReportingError(f"{metric} of {row} and {over}: fewer than two recorded runs have both")
    if len(recorded) > 1:
        tables = sorted(pair.result.table.id for pair in recorded.values())
        raise ReportingError(
            f"{metric} of {row} and {over} is in several tables; choose one with --table: {', '.join(tables)}"
        )
    (pair,) = recorded.values()
    if not statistics.stdev(pair.differences):
        raise ReportingError(
            f"{metric} of {row} and {over} differs by the same amount in all runs, so the variance is zero"
        )
    return pair


def power_of(gap: float, spread: float, runs: int) -> float:
    """Return the probability that the 95 % interval of `runs` normal differences is above 0.

    `gap` is the mean of the differences, and `spread` is their standard deviation.
    """
    limit = stdtrit(runs - 1, (1 + CONFIDENCE) / 2)
    return float(1 - nctdtr(runs - 1, gap / spread * math.sqrt(runs), limit))


def runs_for(gap: float, spread: float, power: float) -> int:
    """Return the smallest number of runs with this power, or more than `MOST_RUNS` if `MOST_RUNS` is not enough."""
    return 2 + bisect_left(range(2, MOST_RUNS + 1), power, key=lambda runs: power_of(gap, spread, runs))


def smallest_gap(spread: float, runs: int, power: float) -> float:
    """Return the smallest true difference that `runs` runs separate with this power."""
    limit = stdtrit(runs - 1, (1 + CONFIDENCE) / 2)
    return float(nctdtrinc(runs - 1, 1 - power, limit)) * spread / math.sqrt(runs)


def spread_range(spread: float, runs: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a standard deviation `spread` that was estimated from `runs` values."""
    ends = chdtri(runs - 1, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = (spread * math.sqrt((runs - 1) / end) for end in ends)
    return low, high
