"""Claims: whether the orderings that a paper asserts hold over the measured cells, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from common.reporting.aggregate import TableResult
from common.reporting.predicates import CellName, Comparison
from common.reporting.tables import Claim

HOLDS = "holds"
FAILS = "fails"
NOT_SEPARABLE = "not separable"
NOT_RUN = "not run"
_WORST_FIRST = (FAILS, NOT_RUN, NOT_SEPARABLE, HOLDS)


@dataclass(frozen=True)
class ClaimResult:
    """The verdict on a claim at one scale.

    Args:
        claim: the claim.
        table: id of its table.
        scale: the scale.
        verdict: ``holds``, ``fails``, ``not separable`` or ``not run``.
        margin: mean over seeds by which the deciding comparison holds (positive) or fails (negative).
        spread: sample standard deviation of the paired margin; None below two seeds.
        seeds: the seeds for which every cell of the deciding comparison was measured.
        detail: why it was not run, if so.
        conditional: whether the claim's ``when`` was measured and not met.
    """

    claim: Claim
    table: str
    scale: str
    verdict: str
    margin: float | None = None
    spread: float | None = None
    seeds: tuple[int, ...] = ()
    detail: str = ""
    conditional: bool = False

    @property
    def label(self) -> str:
        """The verdict in words; says so when it rests on one seed."""
        return f"{self.verdict} (1 seed)" if len(self.seeds) == 1 and self.verdict != NOT_RUN else self.verdict

    @property
    def margin_text(self) -> str:
        """The margin, and how many times the spread it is."""
        if self.margin is None:
            return self.detail or "–"
        text = f"{self.margin:+.3g}"
        if self.spread is None:
            return text
        if self.spread == 0:
            return f"{text} (spread 0, n={len(self.seeds)})"
        return f"{text} = {self.margin / self.spread:+.1f} spreads (n={len(self.seeds)})"


@dataclass(frozen=True)
class _Outcome:
    verdict: str
    margin: float | None = None
    spread: float | None = None
    seeds: tuple[int, ...] = ()
    detail: str = ""

    @property
    def badness(self) -> tuple[int, float]:
        """Orders outcomes: the worst verdict first, then the smallest margin in units of spread."""
        margin = self.margin if self.margin is not None else 0.0
        return _WORST_FIRST.index(self.verdict), margin / self.spread if self.spread else margin


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
        claim, result.table.id, result.scale, worst.verdict, worst.margin, worst.spread, worst.seeds, worst.detail
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
    seeds = sorted(set.intersection(*(set(result.cells[name.row, name.metric].values) for name in comparison.cells())))
    if not seeds:
        return _Outcome(NOT_RUN, detail="no seed has all its cells")
    try:
        margins = [
            comparison.margin(lambda name, seed=seed: result.cells[name.row, name.metric].values[seed])  # type: ignore[misc]
            for seed in seeds
        ]
    except ZeroDivisionError:
        return _Outcome(NOT_RUN, detail="divides by zero")
    margin = statistics.fmean(margins)
    spread = statistics.stdev(margins) if len(margins) > 1 else None
    if spread is not None and abs(margin) < spread:
        verdict = NOT_SEPARABLE
    else:
        verdict = HOLDS if comparison.accepts(margin) else FAILS
    return _Outcome(verdict, margin, spread, tuple(seeds))


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


def held(results: Iterable[ClaimResult]) -> tuple[int, int]:
    """How many claims hold, of how many."""
    judged = list(results)
    return sum(r.verdict == HOLDS for r in judged), len(judged)
