"""Compare a run's cells with the mean and standard deviation of the recorded runs, worst first.

A cell is in range if it is within the 95 % prediction interval of the recorded draws (Student's t: two standard
deviations for many seeds, 2.8 for six), within its metric's tolerance, or equal up to the last printed digit.
Roundings of one seed are averaged. One cell in twenty is outside by chance, and the cells of one draw are correlated.
A recorded draw of the same seed also predicts the cell, within a narrower interval; see `_same_seed`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from statistics import fmean, median, variance

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable
from scipy.special import chdtri, stdtr, stdtrit

from assemble.reporting.aggregate import Cell, collect
from assemble.reporting.claims import seed_means
from assemble.reporting.draws import Draw, by_seed
from assemble.reporting.papers import paper_named
from assemble.reporting.records import Record
from assemble.reporting.render import GIVEN_MARK, heading, measured_text
from assemble.reporting.results import find_promoted
from assemble.reporting.tables import Metric, Row, Table, Tables

OUTSIDE = "outside"
IN_RANGE = "in range"
NO_REFERENCE = "no reference"
_WORST_FIRST = (OUTSIDE, IN_RANGE, NO_REFERENCE)
#: Expected fraction of cells outside in a valid draw, and of valid draws rejected because of their worst cell.
CHANCE = 0.05
BIT_EQUAL = "bit-equal"
WITHIN = "within rounding"
DIFFERS = "differs"
#: Number of seeds that must be recorded under two roundings before a difference from the same seed fails a run.
ENOUGH_PAIRS = 5
#: Weight of a paper's typical rounding variance, in degrees of freedom.
PRIOR = 4
#: How many times more cells than expected may be outside, since the cells of a draw are correlated.
CROWD = 3


@dataclass(frozen=True)
class SameSeed:
    """Hold a measured cell and its prediction from the recorded draws of the same seed.

    Args:
        difference: measured minus predicted.
        allowed: half the 95 % prediction interval.
        likelihood: probability that rounding causes such a difference.
        equal: whether a recorded draw of the seed has exactly this value.
        decisive: whether the comparison may fail a run, because enough seeds were recorded under two roundings.
    """

    difference: float
    allowed: float
    likelihood: float
    equal: bool
    decisive: bool

    @property
    def ratio(self) -> float:
        return abs(self.difference) / self.allowed

    @property
    def verdict(self) -> str:
        return BIT_EQUAL if self.equal else WITHIN if self.ratio <= 1 else DIFFERS


@dataclass(frozen=True)
class Compared:
    """Hold a measured cell and its reference, with roundings averaged. `table` is the first table with this cell.

    Args:
        difference: measured minus reference; None without a reference.
        spread: standard deviation over recorded seeds; None below two.
        allowed: the largest difference that counts as reproduced. It includes the uncertainty of both means.
        ratio: the difference in units of the allowed one.
        likelihood: probability that a valid draw differs at least this much; 0.05 at the allowed difference.
        verdict: `in range`, `outside` or `no reference`; one seed has no spread to compare with.
        constant: whether all draws (recorded and compared) agree to the last digit, so the cell can't tell runs apart.
        same: the comparison with the same seed; None if the seed isn't recorded or the effect of rounding is unknown.
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
    constant: bool
    same: SameSeed | None

    @property
    def remark(self) -> str:
        """Say why cell and reference may not be comparable, or why there is no reference. Usually empty."""
        if self.difference is None:
            return "nothing recorded"
        ours = {(r.stage, r.configuration) for r in self.mine.records}
        if ours != {(r.stage, r.configuration) for r in self.reference.records}:
            return "another configuration"
        return "one seed recorded" if self.spread is None else ""

    @property
    def label(self) -> str:
        return f"{self.row.label}{GIVEN_MARK * any(record.given for record in self.mine.records)}"

    @property
    def text(self) -> str:
        """Describe the cell: `AVID, UCF101 top-1 78.1 against 83.0 ± 2.1`."""
        mine, reference = (
            measured_text(cell, self.metric.decimals, len(cell.values)) for cell in (self.mine, self.reference)
        )
        return f"{self.label}, {self.metric.label} {mine} against {reference}"


def _compared(
    table: Table, row: Row, metric: Metric, scale: str, mine: Cell, reference: Cell, share: float | None
) -> Compared:
    tolerance, last_digit = metric.tolerance.get(scale), 0.5 * 10.0**-metric.decimals
    same = _same_seed(mine, reference, share, (tolerance or 0.0) / 4, last_digit)
    fewer = _per_seed(mine) - _per_seed(reference)  # A mean of fewer roundings varies more.
    extra = max(0.0, fewer * _rounding(reference, share)[0])
    mine, reference = (
        replace(cell, values={Draw(seed): fmean(values) for seed, values in by_seed(cell.values).items()})
        for cell in (mine, reference)
    )
    measured, recorded, spread = mine.values, reference.values, reference.spread
    difference = None if mine.mean is None or reference.mean is None else mine.mean - reference.mean
    if spread is None and measured.keys() != recorded.keys():
        tolerance = None  # The tolerance covers the error of the test set; other seeds may differ by more.
    limit = float(stdtrit(len(recorded) - 1, 1 - CHANCE / 2))
    chance = limit * math.sqrt(spread**2 / len(recorded) + (spread**2 + extra) / len(measured)) if spread else 0.0
    allowed = max(chance, tolerance or 0.0, last_digit)
    ratio = abs(difference or 0.0) / allowed
    likelihood = 1.0 if spread is None else float(2 * stdtr(len(recorded) - 1, -ratio * limit))
    if difference is None or (ratio > 1 and spread is None and tolerance is None):
        verdict = NO_REFERENCE
    else:
        verdict = IN_RANGE if ratio <= 1 else OUTSIDE
    agree = spread is not None and spread < last_digit and scale not in metric.tolerance
    constant = agree and verdict == IN_RANGE
    return Compared(
        table, row, metric, mine, reference, difference, spread, allowed, ratio, likelihood, verdict, constant, same
    )


def _per_seed(cell: Cell) -> float:
    """Return the mean over seeds of 1 / (number of roundings of the seed)."""
    return fmean(1 / len(values) for values in by_seed(cell.values).values()) if cell.values else 0.0


def _rounding(reference: Cell, share: float | None) -> tuple[float, int]:
    """Return the variance over roundings, pooled over seeds, and its degrees of freedom. If `share` is given, shrink
    the variance over roundings towards `share` times the variance over seeds."""
    groups = [values for values in by_seed(reference.values).values() if len(values) > 1]
    degrees = sum(len(values) - 1 for values in groups)
    squares = sum((len(values) - 1) * variance(values) for values in groups)
    if share is None:
        return squares / max(1, degrees), degrees
    means = seed_means(reference.values)
    usual = share * variance(means) if len(means) > 1 else 0.0
    return (squares + PRIOR * usual) / (degrees + PRIOR), degrees + PRIOR


def _share(references: Iterable[Cell]) -> float | None:
    """Return the rounding variance divided by the variance over seeds (median over cells), or None if unknown."""
    shares = []
    for cell in references:
        means, (rounding, degrees) = seed_means(cell.values), _rounding(cell, None)
        if degrees and len(means) > 1 and (spread := variance(means)):
            # An estimated variance with few degrees of freedom is usually too small.
            shares.append(rounding / spread * degrees / float(chdtri(degrees, 0.5)))
    return median(shares) if shares else None


def _same_seed(mine: Cell, reference: Cell, share: float | None, floor: float, last_digit: float) -> SameSeed | None:
    """Compare a cell with the recorded draws of the same seed. Seeds are random effects; roundings vary within a seed.

    The prediction is the seed's recorded mean, shrunk towards the mean over seeds. It shrinks by the share of rounding
    in the variance of the seed's mean.
    """
    measured, recorded = by_seed(mine.values), by_seed(reference.values)
    if share is None or len(recorded) < 2 or not measured.keys() & recorded.keys():
        return None
    means = {seed: fmean(values) for seed, values in recorded.items()}
    center, spread = fmean(means.values()), variance(means.values())
    rounding, degrees = _rounding(reference, share)
    rounding = max(rounding, floor**2)
    between = max(0.0, spread - rounding * _per_seed(reference))
    limit = float(stdtrit(degrees, 1 - CHANCE / 2))
    decisive = sum(len(values) > 1 for values in recorded.values()) >= ENOUGH_PAIRS
    results = []
    for seed in measured.keys() & recorded.keys():
        weight = between / (between + rounding / len(recorded[seed])) if between else 0.0
        off = fmean(measured[seed]) - center - weight * (means[seed] - center)
        expected = (1 - weight) * between + rounding / len(measured[seed]) + (1 - weight) ** 2 * spread / len(recorded)
        allowed = max(limit * math.sqrt(expected), last_digit)
        likelihood = float(2 * stdtr(degrees, -limit * abs(off) / allowed))
        results.append(SameSeed(off, allowed, likelihood, set(measured[seed]) <= set(recorded[seed]), decisive))
    return max(results, key=lambda same: same.ratio)


def others_recorded(paper: str, scale: str, mine: Iterable[Record]) -> list[Record]:
    """Return the promoted records except those of `mine`, since a run must not be its own reference."""
    # Compare by seed, because promotion may have added the instruction set to the name.
    identities = {(record.stage, record.seed, record.started) for record in mine}
    return [r for r in find_promoted(paper, scale) if (r.stage, r.seed, r.started) not in identities]


def compare(source: Tables, scale: str, mine: Iterable[Record], reference: Iterable[Record]) -> list[Compared]:
    """Compare a paper's trained cells at one scale with their references, worst first.

    Omit cells whose draws all agree to the last digit.
    """
    cells: dict[tuple[tuple[str, ...], str, bool], Compared] = {}
    mine, reference = [*mine], [*reference]
    results = collect(source, scale, reference)
    share = _share(cell for result in results for cell in result.cells.values())
    if share is None and (usual := paper_named(source.paper).rounding) is not None:
        share = usual**2
    # Runs that start from given weights are compared with such runs alone.
    given = [collect(source, scale, records, given=True) for records in (mine, reference)]
    for ours, theirs in [*zip(collect(source, scale, mine), results), *zip(*given)]:
        for row in (row for row in ours.rows if not row.untrained):
            for metric in ours.table.metrics:
                cell, other = ours.cells[row.label, metric.id], theirs.cells[row.label, metric.id]
                if cell.values and metric.compared:
                    compared = _compared(ours.table, row, metric, scale, cell, other, share)
                    cells.setdefault((cell.instances, metric.key, ours.given), compared)
    varying = [compared for compared in cells.values() if not compared.constant]
    return sorted(varying, key=lambda c: (_WORST_FIRST.index(c.verdict), -c.ratio))


def summary(compared: Sequence[Compared]) -> str:
    """Return the verdict, such as `matches the recorded runs: 41 of 42 cells in the expected range, worst: ...`."""
    judged = [c for c in compared if c.verdict != NO_REFERENCE]
    lacking = len(compared) - len(judged)
    if not judged:
        return f"cannot be judged: no cell has a reference ({lacking} measured)"
    good = sum(c.verdict == IN_RANGE for c in judged)
    cells = f"{good} of {len(judged)} cells in the expected range"
    if failure := strict_failure(compared):
        text = f"does not match the recorded runs: {failure}; {cells}"
    else:
        chance = "" if good == len(judged) else " (by chance, one in twenty is outside)"
        text = f"matches the recorded runs: {cells}{chance}, worst: {judged[0].text}"
    text += f"; {lacking} without a reference" if lacking else ""
    counts = Counter(c.same.verdict for c in compared if c.same)
    words = {BIT_EQUAL: BIT_EQUAL, WITHIN: WITHIN, DIFFERS: DIFFERS if counts[DIFFERS] == 1 else "differ"}
    same = ", ".join(f"{counts[verdict]} {word}" for verdict, word in words.items() if counts[verdict])
    return text + (f"; same seed: {same}" if same else "")


def strict_failure(compared: Sequence[Compared]) -> str | None:
    """Say why these runs don't match the recorded ones. None if they match, or if no cell has a reference.

    They don't match if the worst cell would occur in fewer than one valid draw in twenty (Bonferroni), or if more than
    three in twenty cells (and more than one) are outside. The same rules apply to decisive comparisons with the same
    seed.
    """
    across = [(c, c.likelihood, c.ratio, c.verdict == OUTSIDE) for c in compared if c.verdict != NO_REFERENCE]
    decisive = [(c, c.same) for c in compared if c.same and c.same.decisive]
    same = [(c, s.likelihood, s.ratio, s.verdict == DIFFERS) for c, s in decisive]
    for judged, note in ((across, ""), (same, " from the same seed")):
        worst, likelihood, ratio, _ = min(judged, key=itemgetter(1), default=(None, 1.0, 0.0, False))
        if worst and likelihood * len(judged) < CHANCE:
            return (
                f"{worst.text} is off{note} by {ratio:.1f} times the allowed difference (in 19 of 20 recorded runs, "
                f"the worst of {len(judged)} cells is closer)"
            )
        outside = sum(is_outside for *_, is_outside in judged)
        if outside > max(1, CROWD * CHANCE * len(judged)):
            return f"{outside} of {len(judged)} cells are outside{note}; by chance, one in twenty would be"
    return None


def rich_comparison(compared: Sequence[Compared]) -> RichTable:
    colors = {OUTSIDE: "red", IN_RANGE: "green", NO_REFERENCE: "dim"}
    table = RichTable(box=box.SIMPLE_HEAD)
    same_seed = any(c.same for c in compared)
    for name in ("cell", "measured", "reference", "difference", "allowed", "verdict", *["same seed"] * same_seed):
        table.add_column(name, justify="left" if name in ("cell", "verdict", "same seed") else "right")
    for c in compared:
        digits = c.metric.decimals
        verdict = f"[{colors[c.verdict]}]{c.verdict}[/]" + (f" ({c.remark})" if c.remark else "")
        table.add_row(
            escape(f"{c.table.id}: {c.label}, {heading(c.metric)}"),
            measured_text(c.mine, digits),
            measured_text(c.reference, digits),
            "" if c.difference is None else f"{c.difference:+.{digits}f}",
            "" if c.verdict == NO_REFERENCE else f"{c.allowed:.{digits + 1}f}",
            verdict,
            *[_same_seed_text(c.same, digits)] * same_seed,
        )
    return table


def _same_seed_text(same: SameSeed | None, digits: int) -> str:
    """Return `within rounding: +0.8, allowed 3.8`."""
    if same is None or same.equal:
        return same.verdict if same else ""
    return f"{same.verdict}: {same.difference:+.{digits}f}, allowed {same.allowed:.{digits + 1}f}"
