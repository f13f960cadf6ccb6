"""Test the claims: the language of predicates, and the verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from assemble.reporting.aggregate import Cell, TableResult
from assemble.reporting.claims import Judged, judge
from assemble.reporting.draws import Draw
from assemble.reporting.predicates import parse
from assemble.reporting.tables import Check, Claim, Metric, Row, Table, load
from common.errors import ReportingError

ROWS = ("AVID", "AVID-CMA", "AVID continued", "Top (8)", "8")
METRICS = ("ucf", "esc")


def value(text: str, **cells: float) -> bool:
    comparison = parse(text, ROWS, METRICS).comparisons[0]
    return comparison.accepts(comparison.difference(lambda name: cells[name.row.replace("-", "_").replace(" ", "_")]))


def test_labels_with_hyphens_and_spaces() -> None:
    predicate = parse("AVID-CMA.ucf >= `AVID continued`.ucf + 2 * (AVID.esc - 1) / 4", ROWS, METRICS)
    names = [str(name) for name in predicate.comparisons[0].cells()]
    assert names == ["AVID-CMA.ucf", "`AVID continued`.ucf", "AVID.esc"]
    assert [str(n) for n in parse("`Top (8)`.ucf > 0 and 8.ucf < 1", ROWS, METRICS).comparisons[1].cells()] == ["8.ucf"]


def test_arithmetic() -> None:
    assert value("AVID.ucf >= 2 + 3 * 4", AVID=14.0)
    assert not value("AVID.ucf > 2 + 3 * 4", AVID=14.0)
    assert value("-AVID.ucf <= -(1 + 1) / 2", AVID=1.0)
    assert value("AVID.ucf-AVID-CMA.ucf<0.5", AVID=1.0, AVID_CMA=0.9)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true') >= AVID.ucf",
        "AVID.ucf",
        "AVID.ucf == AVID.esc",
        "1 < AVID.ucf < 3",
        "AVID.ucf >= 1 or AVID.esc >= 1",
        "AVID.ucf >= AVID.esc ** 9",
        "AVID.ucf >= 'high'",
        "AVID.ucf >= True",
        "1 >= 2",
        "AVID.ucf >=",
        "AVID.ucf >= 1 / 0",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ReportingError):
        parse(text, ROWS, METRICS)


def drawn(values: dict[int, float]) -> dict[Draw, float]:
    return {Draw(seed): value for seed, value in values.items()}


def filled(holds: str, a: dict[int, float], b: dict[int, float]) -> TableResult:
    scales = ("paper", "mini", "smoke")
    metric = Metric(id="x", label="x", stages={}, key="x")
    rows = tuple(Row(label=label, untrained=True, scales=scales) for label in "AB")
    claim = Claim(id="c", text="text", holds=parse(holds, "AB", "x"), scales=scales, paper="+0.6")
    table = Table(id="t", title="T", source="s", scales=scales, metrics=(metric,), rows=rows, claims=(claim,))
    return TableResult(table, "mini", {("A", "x"): Cell(values=drawn(a)), ("B", "x"): Cell(values=drawn(b))}, ())


def judged(*args: Any) -> list[Judged]:
    result = filled(*args)
    return judge(result, result.table.claims)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ({0: 5.0, 1: 6.0, 2: 7.0}, {0: 1.0, 1: 2.5, 2: 2.0}, "holds"),
        ({0: 1.0, 1: 2.5, 2: 2.0}, {0: 5.0, 1: 6.0, 2: 7.0}, "fails"),
        ({0: 1.0, 1: 5.0}, {0: 2.0, 1: 3.0}, "not separable"),
        # A is ahead by 1, 2 and 3. This is two standard deviations, but the interval of three draws goes below zero.
        ({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0}, "not separable"),
        ({0: 2.0}, {0: 1.0}, "sign agrees"),
        ({0: 1.0}, {0: 2.0}, "sign differs"),
        ({1: 1.0}, {0: 2.0}, "not run"),
        ({0: 2.0, 1: 2.0}, {0: 2.0, 1: 2.0}, "holds"),
    ],
)
def test_verdicts(a: dict[int, float], b: dict[int, float], verdict: str) -> None:
    assert judged("A.x >= B.x", a, b)[0].verdict == verdict


def test_the_difference_is_paired_and_leaves_the_threshold_out() -> None:
    # The seeds differ by 10 points, but the differences within pairs are small. Only pairing separates the rows.
    result = judged("A.x >= B.x + 1", {0: 13.0, 1: 23.5, 2: 33.0, 7: 0.0}, {0: 10.0, 1: 20.0, 2: 30.0})[0]
    assert result.difference == pytest.approx(19 / 6)
    # 4.302653 is the two-sided 95 % point of Student's t with two degrees of freedom.
    half = 4.302653 * 0.288675 / 3**0.5
    assert result.interval == pytest.approx((19 / 6 - half, 19 / 6 + half), abs=1e-5)
    assert result.outcome == "+3.17 (+2.45 to +3.88; n=3)"
    found = [judged(holds, {0: 1.0}, {0: 4.0})[0] for holds in ("A.x < B.x", "A.x + 2 > B.x / 2")]
    assert [(one.difference, one.excess) for one in found] == [(-3.0, 3.0), (-1.0, 1.0)]
    assert judged("A.x / B.x < 0.5", {0: 1.0, 1: 1.0}, {0: 4.0, 1: 4.0})[0].outcome == "+0.25 (+0.25 to +0.25; n=2)"


def test_a_printed_row_counts_at_paper_scale_alone(project: Path) -> None:
    file = project / "papers" / "mct" / "tables.yaml"
    file.write_text(file.read_text().replace("New-One.ucf >= New.ucf + 1", "New-One.ucf > Other.ucf"))
    table = load("mct").tables[0]
    assert table.margin(table.claims[0]) == "+2"
    found = {("New-One", "ucf"): Cell(values=drawn({0: 85.0, 1: 86.0}))}
    assert judge(TableResult(table, "paper", found, ()), table.claims)[0].outcome.startswith("+5.5 ")
    assert judge(TableResult(table, "mini", found, ()), table.claims)[0].detail == "not measured: Other.ucf"
    printed = Check(id="c", text="text", holds=parse("Other.ucf > 70", ["Other"], ["ucf"]))
    assert judge(TableResult(table, "paper", {}, ()), [printed])[0].detail == "no draw has all cells"


def test_strict_comparison_and_worst_part_decide() -> None:
    assert judged("A.x > B.x", {0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})[0].verdict == "fails"
    result = judged("A.x > B.x and A.x > B.x + 5", {0: 3.0, 1: 3.0}, {0: 1.0, 1: 1.0})[0]
    assert (result.verdict, result.outcome) == ("fails", "+2 (+2 to +2; n=2) in x: A vs. B")
    assert judged("A.x / B.x > 1", {0: 1.0}, {0: 0.0})[0].detail == "divides by zero"
    # If both values are equal, `>=` holds and `>` doesn't.
    verdicts = [judged(f"A.x {sign} B.x", {0: 1.0}, {0: 1.0})[0].verdict for sign in (">=", ">")]
    assert verdicts == ["sign agrees", "sign differs"]
