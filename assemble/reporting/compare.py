"""Compares a run's cells with the recorded mean and spread over draws, worst first.

A cell is in range if it is within the 95 % prediction interval of the recorded draws (Student's t: two standard
deviations for many seeds, 2.8 for six; roundings of one seed are not independent), within its metric's tolerance, or
equal up to the last printed digit. So one cell in twenty is outside by chance; the cells of one draw are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from assemble.reporting.aggregate import Cell, collect
from assemble.reporting.draws import by_seed
from assemble.reporting.records import Record
from assemble.reporting.render import heading, measured_text
from assemble.reporting.results import find_promoted
from assemble.reporting.tables import Metric, Row, Table, Tables

OUTSIDE = "outside"
IN_RANGE = "in range"
NO_REFERENCE = "no reference"
_WORST_FIRST = (OUTSIDE, IN_RANGE, NO_REFERENCE)
#: Expected fraction of a valid draw's cells outside, and of valid draws rejected for their worst cell.
CHANCE = 0.05
#: A draw may have so many times more cells outside than expected, since its cells are correlated.
CROWD = 3


@dataclass(frozen=True)
class Compared:
    """A measured cell and its reference; `table` is the first table with this cell.

    Args:
        difference: measured minus reference; None without a reference.
        spread: standard deviation of the recorded draws; None below two seeds.
        allowed: the largest difference that still reproduces the reference; counts the uncertainty of both means.
        ratio: the difference in units of the allowed one.
        likelihood: probability that a draw like the recorded ones is this far off: 0.05 at the allowed difference.
        verdict: `in range`, `outside` or `no reference`; one seed has no spread to compare with.
        settled: whether all draws, recorded and compared, agree to the last digit, so the cell can't tell runs apart.
    """

    table: Table
    row: Row
    metric: Metric
    mine: Cell
    reference: Cell
    difference: float | None
    spread: float | None
    allowed: float
    ratio: float
    likelihood: float
    verdict: str
    settled: bool

    @property
    def remark(self) -> str:
        """Why the two may not be comparable, or why there is no reference; usually empty."""
        if self.difference is None:
            return "nothing recorded"
        ours = {(r.stage, r.configuration) for r in self.mine.records}
        if ours != {(r.stage, r.configuration) for r in self.reference.records}:
            return "another configuration"
        return "one seed recorded" if self.spread is None else ""

    @property
    def told(self) -> str:
        """`AVID, UCF101 top-1 78.1 against 83.0 ± 2.1`."""
        mine, reference = (
            measured_text(cell, self.metric.decimals, len(cell.values)) for cell in (self.mine, self.reference)
        )
        return f"{self.row.label}, {self.metric.label} {mine} against {reference}"


def _compared(table: Table, row: Row, metric: Metric, scale: str, mine: Cell, reference: Cell) -> Compared:
    from scipy.special import stdtr, stdtrit

    difference = None if mine.mean is None or reference.mean is None else mine.mean - reference.mean
    own, recorded = by_seed(mine.values), by_seed(reference.values)
    spread = reference.spread if len(recorded) > 1 else None
    tolerance = metric.tolerance.get(scale)
    if spread is None and own.keys() != recorded.keys():
        tolerance = None  # it is the error of the test set; other seeds may differ by more
    last_digit = 0.5 * 10.0**-metric.decimals
    limit = float(stdtrit(len(recorded) - 1, 1 - CHANCE / 2))
    chance = limit * spread * math.sqrt(1 / len(recorded) + 1 / len(own)) if spread else 0.0
    allowed = max(chance, tolerance or 0.0, last_digit)
    ratio = abs(difference or 0.0) / allowed
    likelihood = 1.0 if spread is None else float(2 * stdtr(len(recorded) - 1, -ratio * limit))
    if difference is None or (ratio > 1 and spread is None and tolerance is None):
        verdict = NO_REFERENCE
    else:
        verdict = IN_RANGE if ratio <= 1 else OUTSIDE
    agree = spread is not None and spread < last_digit and scale not in metric.tolerance
    settled = agree and verdict == IN_RANGE
    return Compared(
        table, row, metric, mine, reference, difference, spread, allowed, ratio, likelihood, verdict, settled
    )


def others_recorded(paper: str, scale: str, mine: Iterable[Record]) -> list[Record]:
    """Promoted records other than these runs: a run that was promoted is no reference for itself."""
    # By seed, because promotion may have named the instruction set.
    own = {(record.stage, record.seed, record.started) for record in mine}
    return [record for record in find_promoted(paper, scale) if (record.stage, record.seed, record.started) not in own]


def compare(source: Tables, scale: str, mine: Iterable[Record], reference: Iterable[Record]) -> list[Compared]:
    """Compare every trained, unsettled cell of a paper at one scale, once, with its reference; worst first."""
    found: dict[tuple[tuple[str, ...], str], Compared] = {}
    for ours, theirs in zip(collect(source, scale, mine), collect(source, scale, reference)):
        for row in (row for row in ours.rows if not row.untrained):
            for metric in ours.table.metrics:
                cell, other = ours.cells[row.label, metric.id], theirs.cells[row.label, metric.id]
                if cell.values and metric.compared:
                    compared = _compared(ours.table, row, metric, scale, cell, other)
                    found.setdefault((cell.instances, metric.key), compared)
    unsettled = [compared for compared in found.values() if not compared.settled]
    return sorted(unsettled, key=lambda c: (_WORST_FIRST.index(c.verdict), -c.ratio))


def summary(compared: Sequence[Compared]) -> str:
    """The verdict, such as `matches the recorded runs: 41 of 42 cells in the expected range, worst: ...`."""
    judged = [c for c in compared if c.verdict != NO_REFERENCE]
    lacking = len(compared) - len(judged)
    if not judged:
        return f"cannot be judged: no cell has a reference ({lacking} measured)"
    good = sum(c.verdict == IN_RANGE for c in judged)
    cells = f"{good} of {len(judged)} cells in the expected range"
    if failure := strict_failure(compared):
        told = f"does not match the recorded runs: {failure}; {cells}"
    else:
        chance = "" if good == len(judged) else " (by chance, one in twenty is outside)"
        told = f"matches the recorded runs: {cells}{chance}, worst: {judged[0].told}"
    return told + (f"; {lacking} without a reference" if lacking else "")


def strict_failure(compared: Sequence[Compared]) -> str | None:
    """Why these runs don't match the recorded ones; None if they do, or if no cell has a reference.

    They don't match if the worst cell would occur in fewer than one valid draw in twenty (Bonferroni), or if more than
    three in twenty cells (and more than one) are outside.
    """
    judged = [c for c in compared if c.verdict != NO_REFERENCE]
    worst = min(judged, key=lambda c: c.likelihood, default=None)
    if worst and worst.likelihood * len(judged) < CHANCE:
        return (
            f"{worst.told} is off by {worst.ratio:.1f} times the allowed difference (in 19 of 20 recorded runs, the "
            f"worst of {len(judged)} cells is closer)"
        )
    outside = sum(c.verdict == OUTSIDE for c in judged)
    if outside > max(1, CROWD * CHANCE * len(judged)):
        return f"{outside} of {len(judged)} cells are outside, and by chance only one in twenty would be"
    return None


def rich_comparison(compared: Sequence[Compared]) -> RichTable:
    colors = {OUTSIDE: "red", IN_RANGE: "green", NO_REFERENCE: "dim"}
    table = RichTable(box=box.SIMPLE_HEAD)
    for name in ("cell", "measured", "reference", "difference", "allowed", "verdict"):
        table.add_column(name, justify="left" if name in ("cell", "verdict") else "right")
    for c in compared:
        digits = c.metric.decimals
        verdict = f"[{colors[c.verdict]}]{c.verdict}[/]" + (f" ({c.remark})" if c.remark else "")
        table.add_row(
            escape(f"{c.table.id}: {c.row.label}, {heading(c.metric)}"),
            measured_text(c.mine, digits),
            measured_text(c.reference, digits),
            "" if c.difference is None else f"{c.difference:+.{digits}f}",
            "" if c.verdict == NO_REFERENCE else f"{c.allowed:.{digits + 1}f}",
            verdict,
        )
    return table
