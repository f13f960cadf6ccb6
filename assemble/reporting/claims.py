"""Judge claims and checks from the measured cells of each draw.

A claim holds if the 95 % interval of the mean difference over seeds (Student's t) is beyond the threshold. It fails if
the interval is on the other side, and is not separable otherwise. One seed has no interval, so the verdict is whether
the sign agrees. Roundings of one seed count by their mean.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.special import stdtrit

from assemble.reporting.aggregate import TableResult
from assemble.reporting.draws import Draw, by_seed
from assemble.reporting.predicates import CellName, Comparison
from assemble.reporting.tables import Check, Claim

HOLDS = "holds"
FAILS = "fails"
NOT_SEPARABLE = "not separable"
AGREES = "sign agrees"
DIFFERS = "sign differs"
NOT_RUN = "not run"
VERDICTS = (HOLDS, FAILS, NOT_SEPARABLE, AGREES, DIFFERS, NOT_RUN)
_WORST_FIRST = (FAILS, NOT_RUN, DIFFERS, NOT_SEPARABLE, AGREES, HOLDS)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Judged:
    """The verdict on a claim or check at one scale.

    Args:
        paper: the margin in the paper; empty for a check.
        difference: mean over seeds of the deciding comparison's difference.
        interval: 95 % confidence interval of the mean; None below two seeds.
        seeds: number of seeds that have every cell of the deciding comparison.
        rounding: the difference's largest range over roundings of one seed.
        excess: how far the worse end of the interval passes the threshold.
        detail: why the claim was not run. For a claim with several comparisons, the cells of the deciding one.
        origin: see `TableResult.origin`.
        comparison: the deciding comparison; None if the claim was not run.
    """

    check: Check
    table: str
    scale: str
    paper: str = ""
    verdict: str = NOT_RUN
    difference: float | None = None
    interval: tuple[float, float] | None = None
    seeds: int = 0
    rounding: float = 0.0
    excess: float = -math.inf
    detail: str = ""
    origin: str = ""
    comparison: Comparison | None = None

    @property
    def paper_margin(self) -> float | None:
        """Return the paper's margin if it is one number."""
        return float(self.paper) if re.fullmatch(r"[+-]?[\d.]+", self.paper) else None

    @property
    def rounding_note(self) -> str:
        """Return `rounding alone: 2.1` if rounding changes the difference by more than half; else an empty text."""
        return f"rounding alone: {self.rounding:.2g}" if self.rounding > abs(self.difference or 0.0) / 2 else ""

    @property
    def outcome(self) -> str:
        """Return the mean difference, its interval and the number of seeds: `+3.06 (+2.1 to +4.02; n=10)`."""
        if self.difference is None:
            return self.detail
        sign = "+" if self.paper else ""
        interval = " to ".join(f"{end:{sign}.3g}" for end in self.interval or ())
        spread = "; ".join(filter(None, (interval, f"n={self.seeds}", self.rounding_note)))
        return f"{self.difference:{sign}.3g} ({spread}){f' {self.detail}' if self.detail else ''}"


def judge(result: TableResult, checks: Iterable[Check]) -> list[Judged]:
    """Judge the claims or checks of a filled table that exist at its scale."""
    return [_judge(check, result) for check in checks if result.scale in check.scales]


def judge_alike(judged: Judged, result: TableResult) -> Judged:
    """Judge the claim's deciding comparison with the cells of another `result` of the same table."""
    assert judged.comparison is not None
    return _compare(judged.comparison, result, Judged(judged.check, judged.table, judged.scale, judged.paper))


def _judge(check: Check, result: TableResult) -> Judged:
    paper = result.table.margin(check) if isinstance(check, Claim) else ""
    judged = Judged(check, result.table.id, result.scale, paper, origin=result.origin)
    comparisons = check.holds.comparisons
    worst = min(
        (_compare(c, result, judged) for c in comparisons), key=lambda j: (_WORST_FIRST.index(j.verdict), j.excess)
    )
    return worst if len(comparisons) > 1 or worst.difference is None else replace(worst, detail="")


def _compare(comparison: Comparison, result: TableResult, judged: Judged) -> Judged:
    cells, paper = comparison.cells(), result.scale == "paper"
    rows = {cell: result.table.row(cell.row) for cell in cells}
    # At paper scale, rows that aren't measured count with their published numbers.
    printed = {
        cell: number
        for cell, row in rows.items()
        if paper and not row.measured and (number := row.published_number(cell.metric)) is not None
    }
    measured = {
        cell: filled.values
        for cell in cells
        if (filled := result.cells.get((cell.row, cell.metric))) is not None and filled.values
    }
    if missing := [str(cell) for cell in cells if cell not in measured and cell not in printed]:
        return replace(judged, detail=f"not measured: {', '.join(missing)}")
    draws = set.intersection(*map(set, measured.values())) if measured else set()
    if not draws:
        return replace(judged, detail="no draw has all cells")
    differences: dict[Draw, float] = {}
    try:
        for draw in draws:
            values = printed | {cell: by_draw[draw] for cell, by_draw in measured.items()}
            differences[draw] = comparison.difference(values.__getitem__)
    except ZeroDivisionError:
        return replace(judged, detail="divides by zero")
    roundings = by_seed(differences).values()
    means = seed_means(differences)
    difference, interval = statistics.fmean(means), interval_of(means)
    accepted = {comparison.accepts(end) for end in interval or (difference,)}
    yes, no = (HOLDS, FAILS) if interval else (AGREES, DIFFERS)
    return replace(
        judged,
        verdict=NOT_SEPARABLE if len(accepted) > 1 else yes if accepted.pop() else no,
        difference=difference,
        interval=interval,
        seeds=len(means),
        rounding=max(max(group) - min(group) for group in roundings),
        excess=min(map(comparison.excess, interval or (difference,))),
        detail=f"in {_what(cells, result)}",
        comparison=comparison,
    )


def _what(cells: Sequence[CellName], result: TableResult) -> str:
    """Describe the cells that a comparison compares: `SOA-I: S + W vs. none`."""
    rows: dict[str, list[str]] = {}
    for cell in cells:
        rows.setdefault(result.table.metric(cell.metric).label, []).append(cell.row)
    return "; ".join(f"{label}: {' vs. '.join(texts)}" for label, texts in rows.items())


def seed_means(values: Mapping[Draw, float]) -> list[float]:
    """Average the roundings of each seed, since they are not independent."""
    return [statistics.fmean(group) for group in by_seed(values).values()]


def interval_of(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean by Student's t, or None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
