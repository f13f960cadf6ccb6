"""Claims: whether the orderings that a paper asserts hold over the measured cells, draw by draw.

A claim compares its rows in every draw. It holds when the 95 % interval of the mean difference (Student's t) lies
beyond its threshold, fails when the interval lies on the other side, else it is not separable. One draw has none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.reporting.aggregate import TableResult
from common.reporting.draws import Draw
from common.reporting.predicates import CellName, Comparison
from common.reporting.tables import Claim

HOLDS = "holds"
FAILS = "fails"
NOT_SEPARABLE = "not separable"
NOT_RUN = "not run"
VERDICTS = (HOLDS, FAILS, NOT_SEPARABLE, NOT_RUN)
_WORST_FIRST = (FAILS, NOT_RUN, NOT_SEPARABLE, HOLDS)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ClaimResult:
    """The verdict on a claim at one scale.

    Args:
        claim: the claim.
        table: id of its table.
        scale: the scale.
        verdict: `holds`, `fails`, `not separable` or `not run`.
        margin: mean over draws by which the deciding comparison lies above its threshold (positive) or below it.
        interval: where the mean lies with 95 % confidence; None below two draws.
        draws: those for which every cell of the deciding comparison was measured.
        detail: why it was not run, if so.
        conditional: whether the claim's `when` was measured and not met.
    """

    claim: Claim
    table: str
    scale: str
    verdict: str
    margin: float | None = None
    interval: tuple[float, float] | None = None
    draws: tuple[Draw, ...] = ()
    detail: str = ""
    conditional: bool = False

    @property
    def label(self) -> str:
        """The verdict in words; says so when it rests on one draw."""
        return f"{self.verdict} (1 draw)" if len(self.draws) == 1 and self.verdict != NOT_RUN else self.verdict

    @property
    def outcome(self) -> str:
        """What came out: by how much the claim's threshold was passed or missed, the interval, the number of draws."""
        if self.margin is None:
            return self.detail or "–"
        draws = f"{len(self.draws)} draw{'s' if len(self.draws) > 1 else ''}"
        told = f"{'passed' if self.margin >= 0 else 'missed'} by {abs(self.margin):.3g}"
        if self.interval is None:
            return f"{told} ({draws})"
        low, high = self.interval
        return f"{told} (95 %: {low:+.3g} to {high:+.3g}; {draws})"


@dataclass(frozen=True)
class _Outcome:
    verdict: str
    margin: float | None = None
    interval: tuple[float, float] | None = None
    draws: tuple[Draw, ...] = ()
    detail: str = ""

    @property
    def badness(self) -> tuple[int, float]:
        """Orders outcomes: the worst verdict first, then the lowest end of the interval."""
        margin = self.margin if self.margin is not None else 0.0
        return _WORST_FIRST.index(self.verdict), self.interval[0] if self.interval else margin


def judge(result: TableResult) -> list[ClaimResult]:
    """Judge the claims of a filled table that exist at its scale."""
    return [_judge(claim, result) for claim in result.table.claims if result.scale in claim.scales]


def _judge(claim: Claim, result: TableResult) -> ClaimResult:
    if claim.when is not None:
        for condition in claim.when.comparisons:
            reason, measured = _condition(condition, result)
            if reason:
                return ClaimResult(claim, result.table.id, result.scale, NOT_RUN, detail=reason, conditional=measured)
    worst = min((_compare(comparison, result) for comparison in claim.holds.comparisons), key=lambda o: o.badness)
    return ClaimResult(
        claim, result.table.id, result.scale, worst.verdict, worst.margin, worst.interval, worst.draws, worst.detail
    )


def _condition(condition: Comparison, result: TableResult) -> tuple[str, bool]:
    """Why the condition of a claim is not met (empty when it is), and whether that was measured."""
    missing = _missing(condition, result)
    if missing:
        return f"not measured: {missing}", False

    def mean(name: CellName) -> float:
        value = result.cells[name.row, name.metric].mean
        assert value is not None
        return value

    try:
        margin = condition.margin(mean)
    except ZeroDivisionError:
        return "its condition divides by zero", False
    return ("" if condition.accepts(margin) else f"its condition is not met, by {abs(margin):.3g}"), True


def _compare(comparison: Comparison, result: TableResult) -> _Outcome:
    missing = _missing(comparison, result)
    if missing:
        return _Outcome(NOT_RUN, detail=f"not measured: {missing}")
    draws = sorted(set.intersection(*(set(result.cells[name.row, name.metric].values) for name in comparison.cells())))
    if not draws:
        return _Outcome(NOT_RUN, detail="no draw has all its cells")
    try:
        margins = [
            comparison.margin(lambda name, draw=draw: result.cells[name.row, name.metric].values[draw])  # type: ignore[misc]
            for draw in draws
        ]
    except ZeroDivisionError:
        return _Outcome(NOT_RUN, detail="divides by zero")
    margin, interval = statistics.fmean(margins), interval_of(margins)
    low, high = interval or (-math.inf, math.inf)
    verdict = HOLDS if comparison.accepts(low) else NOT_SEPARABLE if comparison.accepts(high) else FAILS
    return _Outcome(verdict, margin, interval, tuple(draws))


def interval_of(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the mean of a normal variable lies with 95 % confidence, by Student's t; None below two values."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    mean = statistics.fmean(values)
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _missing(comparison: Comparison, result: TableResult) -> str:
    empty = [n for n in comparison.cells() if not ((c := result.cells.get((n.row, n.metric))) and c.values)]
    return ", ".join(str(name) for name in empty)


def gate_failures(results: Iterable[ClaimResult]) -> tuple[list[ClaimResult], list[ClaimResult]]:
    """The gated claims at mini that fail, and those that were not measured.

    A claim whose condition was measured and not met is in neither list, nor is one that is not separable.
    """
    gated = [r for r in results if r.scale == "mini" and r.claim.gate == "mini"]
    return (
        [r for r in gated if r.verdict == FAILS],
        [r for r in gated if r.verdict == NOT_RUN and not r.conditional],
    )
