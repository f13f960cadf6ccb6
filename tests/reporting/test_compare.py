"""Test the comparison of runs with recorded runs: verdicts, their order, the summary, the command, and curves."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from assemble.reporting.aggregate import Cell
from assemble.reporting.compare import (
    DIFFERS,
    IN_RANGE,
    NO_REFERENCE,
    OUTSIDE,
    Compared,
    _compared,
    compare,
    strict_failure,
    summary,
)
from assemble.reporting.draws import INSTRUCTION_SETS, Draw
from assemble.reporting.papers import paper_named
from assemble.reporting.promote import promote
from assemble.reporting.records import Record
from assemble.reporting.results import promoted_curves, write_results
from assemble.reporting.tables import load
from tests.reporting.conftest import AUTHORS, Capsys, MakeRecord, Saved
from tests.reporting.test_commands import run

ROUNDED = {"isa": {"requested": "sse41", "machine": "avx2"}}


@pytest.fixture
def reference(make_record: MakeRecord) -> list[Record]:
    """Make two cells: 50 ± 2 over three seeds (one with another rounding), and 20 from one seed."""
    found = [make_record("esc@base", k, value) for k, value in enumerate((48.0, 52.0))]
    found.append(make_record("esc@base", 2, 50.0, hardware=ROUNDED))
    return [*found, make_record("ucf_1@better", 0, 20.0)]


def test_where_nineteen_of_twenty_draws_lie(project: Path, make_record: MakeRecord, reference: list[Record]) -> None:
    def verdict(stage: str, value: float) -> str:
        return compare(load("mct"), "mini", [make_record(stage, 7, value)], reference)[0].verdict

    # The limit is 4.303 (Student's t for three seeds) times 2 times the square root of 1 + 1 / 3, which is 9.94.
    assert [verdict("esc@base", v) for v in (40.1, 59.9, 40.0, 60.0)] == [IN_RANGE] * 2 + [OUTSIDE] * 2
    # One seed gives no variance. A value that rounds to the same number is in range, any other has no reference.
    assert [verdict("ucf_1@better", v) for v in (20.04, 20.2)] == [IN_RANGE, NO_REFERENCE]
    assert verdict("ucf_1@base", 1.0) == NO_REFERENCE
    # Each seed counts once, as the mean of its roundings, so three equal roundings count as one value.
    equal = [
        make_record("esc@base", k, value, hardware={"isa": {"requested": isa}})
        for k, value in enumerate((48.0, 52.0, 50.0))
        for isa in ("native", "sse41", "avx")
    ]
    (found,) = compare(load("mct"), "mini", [make_record("esc@base", 7, 50.0)], equal)
    assert len(found.reference.records) == 9
    assert found.allowed == pytest.approx(4.303 * 2 * (4 / 3) ** 0.5, rel=1e-3)
    roundings = [make_record("esc@base", 2, 48.0, hardware=ROUNDED), make_record("esc@base", 2, 52.0)]
    (found,) = compare(load("mct"), "mini", [make_record("esc@base", 7, 50.0)], [*reference[:2], *roundings])
    assert (found.reference.mean, found.spread) == (50.0, 2.0)
    assert found.allowed > 4.303 * 2 * (4 / 3) ** 0.5  # a single rounding varies more than the mean of two


@pytest.mark.parametrize(("recorded", "mine"), [(3, 1), (6, 1), (6, 3)])
def test_one_honest_cell_in_twenty_lies_outside(
    project: Path, make_record: MakeRecord, recorded: int, mine: int
) -> None:
    draws = np.random.default_rng(0).normal(size=(100_000, recorded + mine))
    spread = draws[:, :recorded].std(1, ddof=1)
    off = abs(draws[:, recorded:].mean(1) - draws[:, :recorded].mean(1)) / spread
    reference = [make_record("esc@base", k, value) for k, value in enumerate(draws[0, :recorded])]
    (cell,) = compare(
        load("mct"), "mini", [make_record("esc@base", k, v) for k, v in enumerate(draws[0, recorded:])], reference
    )
    assert cell.reference.spread == pytest.approx(spread[0])
    assert (off > cell.allowed / spread[0]).mean() == pytest.approx(0.05, abs=0.003)
    assert (off > off[0]).mean() == pytest.approx(cell.likelihood, abs=0.005)


@pytest.mark.parametrize(("roundings", "noise"), [((3, 1, 1, 1, 1, 1), 1.0), ((2,) * 6, 0.5)])
def test_coverage_with_several_roundings(project: Path, roundings: tuple[int, ...], noise: float) -> None:
    table = load("mct").tables[0]
    share = noise**2 / (1 + noise**2 * np.mean([1 / count for count in roundings]))
    random, isas, outside = np.random.default_rng(0), list(INSTRUCTION_SETS), []
    for _ in range(1_500):
        seeds = random.normal(size=len(roundings) + 1)

        def cell(seed: int, count: int, first: int = 0) -> dict[Draw, float]:
            values = seeds[seed] + noise * random.normal(size=count)  # noqa: B023
            return {Draw(seed, isas[first + k]): float(value) for k, value in enumerate(values)}

        recorded = Cell(values={k: v for seed, n in enumerate(roundings) for k, v in cell(seed, n).items()})
        row, metric = table.rows[0], table.metrics[0].model_copy(update={"decimals": 9})
        other = _compared(table, row, metric, "mini", Cell(values=cell(len(roundings), 1)), recorded, share)
        again = _compared(table, row, metric, "mini", Cell(values=cell(0, 1, 4)), recorded, share).same
        assert again
        outside.append((other.verdict == OUTSIDE, again.verdict == DIFFERS))
    assert np.mean(outside, axis=0) == pytest.approx([0.05, 0.05], abs=0.02)


def test_the_same_seed_is_compared_first(project: Path, make_record: MakeRecord) -> None:
    def recorded(pairs: int) -> list[Record]:
        records = [make_record("esc@base", k, 50.0 + 10 * k) for k in range(6)]
        return records + [make_record("esc@base", k, 50.2 + 10 * k, hardware=ROUNDED) for k in range(pairs)]

    def cell(value: float, pairs: int = 4) -> Compared:
        return compare(load("mct"), "mini", [make_record("esc@base", 0, value)], recorded(pairs))[0]

    verdicts = [(found.verdict, found.same and found.same.verdict) for found in map(cell, (50.0, 50.3, 70.0))]
    assert verdicts == [(IN_RANGE, "bit-equal"), (IN_RANGE, "within rounding"), (IN_RANGE, DIFFERS)]
    # If five seeds were recorded under two roundings, a run fails when it differs from the same seed.
    assert strict_failure([cell(70.0)]) is None
    assert summary([cell(70.0), cell(50.0)]).endswith("; same seed: 1 bit-equal, 1 differs")
    assert "is off from the same seed by" in str(strict_failure([cell(70.0, pairs=5)]))
    assert strict_failure([cell(50.3, pairs=5)]) is None
    # If no seed has several roundings, the effect of rounding is unknown, unless tables.yaml gives its size.
    assert cell(70.0, pairs=0).same is None
    path = project / "papers/mct/tables.yaml"
    path.write_text(path.read_text().replace("recipe: base}", "recipe: base, rounding: 0.1}", 1))
    assert summary([cell(70.0, pairs=0)]).endswith("; same seed: 1 differs")


def test_given_weights_are_compared_with_given_weights(project: Path, make_record: MakeRecord) -> None:
    ours = [make_record("esc@base", k, value) for k, value in enumerate((48.0, 52.0, 50.0))]
    theirs = [make_record("esc@base", k, value, given=AUTHORS) for k, value in enumerate((70.0, 71.0, 72.0))]
    (alone,) = compare(load("mct"), "mini", [theirs[1]], ours)
    assert (alone.text, alone.verdict) == ("New †, ESC 71.0 against –", NO_REFERENCE)
    both = compare(load("mct"), "mini", [theirs[1], ours[2]], [*ours, *theirs])
    assert {c.text: c.verdict for c in both} == {
        "New †, ESC 71.0 against 71.0 ± 1.0": IN_RANGE,
        "New, ESC 50.0 against 50.0 ± 2.0": IN_RANGE,
    }


def test_likelihood(project: Path, make_record: MakeRecord, reference: list[Record]) -> None:
    def cell(*values: float) -> Compared:
        mine = [make_record("esc@base", 7 + k, value) for k, value in enumerate(values)]
        return compare(load("mct"), "mini", mine, reference)[0]

    assert cell(54.0).likelihood == cell(46.0).likelihood == pytest.approx(0.225, abs=0.001)
    # A mean of several draws must be closer to the reference.
    assert cell(54.0, 54.0).likelihood < cell(54.0).likelihood
    # A value that is the same in all draws, such as chance, is left out.
    equal = [make_record("esc@base", seed, 50.0) for seed in range(3)]
    assert compare(load("mct"), "mini", [make_record("esc@base", 7, 50.0)], equal) == []
    assert compare(load("mct"), "mini", [make_record("esc@base", 7, 49.0)], equal)[0].verdict == OUTSIDE
    alone = compare(load("mct"), "mini", [make_record("ucf_1@better", 7, 20.0)], reference)[0]
    assert alone.likelihood == 1.0


def test_a_metric_has_its_own_tolerance(project: Path, make_record: MakeRecord, reference: list[Record]) -> None:
    path = project / "papers/mct/tables.yaml"
    given = "stages: {paper: [ucf_1"
    path.write_text(path.read_text().replace(given, "tolerance: {mini: 3.0}, " + given))

    def verdict(value: float) -> str:
        return compare(load("mct"), "mini", [make_record("ucf_1@better", 0, value)], reference)[0].verdict

    assert [verdict(v) for v in (17.0, 23.1)] == [IN_RANGE, OUTSIDE]
    other = make_record("ucf_1@better", 7, 23.1)  # a new seed may differ by more than the test set's error
    assert compare(load("mct"), "mini", [other], reference)[0].verdict == NO_REFERENCE
    path.write_text(path.read_text().replace("{mini: 3.0}", "{paper: 3.0}"))
    assert [verdict(v) for v in (20.0, 17.0)] == [IN_RANGE, NO_REFERENCE]
    path.write_text(path.read_text().replace("{paper: 3.0}", "{paper: -1.0}"))
    with pytest.raises(ValueError, match="tolerance"):
        load("mct")


def test_what_is_no_measurement_is_not_compared(
    project: Path, make_record: MakeRecord, reference: list[Record]
) -> None:
    path = project / "papers/mct/tables.yaml"
    path.write_text(path.read_text().replace("stages: {paper: [ucf_1", "compared: false, stages: {paper: [ucf_1"))
    mine = [make_record("esc@base", 0, 50.0), make_record("ucf_1@better", 0, 20.0)]
    assert [c.metric.label for c in compare(load("mct"), "mini", mine, reference)] == ["ESC"]


def test_worst_first_each_cell_once(project: Path, make_record: MakeRecord, reference: list[Record]) -> None:
    mine = [make_record("esc@base", 0, 62.0), make_record("ucf_1@better", 0, 20.0), make_record("ucf_1@base", 0, 1.0)]
    compared = compare(load("mct"), "mini", mine, reference)
    # `New longer` is filled from the same stages as `New`, so it is not repeated.
    assert [(c.row.label, c.metric.label, c.verdict) for c in compared] == [
        ("New", "ESC", OUTSIDE),
        ("New-One", "UCF", IN_RANGE),
        ("New", "UCF", NO_REFERENCE),
    ]
    assert compared[0].difference == 12.0
    assert summary(compared[:1]).startswith("does not match the recorded runs: New, ESC 62.0 against 50.0 ± 2.0")
    assert summary(compared[1:2]).startswith("matches the recorded runs: 1 of 1 cells")
    assert summary(compared) == (
        "matches the recorded runs: 1 of 2 cells in the expected range (by chance, one in twenty is outside), "
        "worst: New, ESC 62.0 against 50.0 ± 2.0; 1 without a reference"
    )
    assert summary(compared[2:]) == "cannot be judged: no cell has a reference (1 measured)"


def test_strict_allows_what_chance_does(project: Path, make_record: MakeRecord, reference: list[Record]) -> None:
    def cell(value: float) -> Compared:
        return compare(load("mct"), "mini", [make_record("esc@base", 7, value)], reference)[0]

    good, outside, far = cell(50.0), cell(60.0), cell(61.0)
    unknown = compare(load("mct"), "mini", [make_record("ucf_1@base", 0, 1.0)], reference)[0]
    assert [c.verdict for c in (outside, far, unknown)] == [OUTSIDE] * 2 + [NO_REFERENCE]
    assert strict_failure([unknown]) is None
    assert strict_failure([outside, good, unknown]) is None
    assert strict_failure([outside] * 3 + [good] * 17) is None
    assert "4 of 21 cells" in str(strict_failure([outside] * 4 + [good] * 17 + [unknown] * 9))
    # By chance, a single cell is this far off in one of 20 draws, but one of two cells is in one of 10.
    assert "New, ESC 61.0 against 50.0 ± 2.0" in str(strict_failure([far]))
    assert strict_failure([far, good]) is None


def test_another_configuration_is_said(project: Path, make_record: MakeRecord, reference: list[Record]) -> None:
    mine = make_record("esc@base", 0, 50.0, config={"rate": 3})
    compared = compare(load("mct"), "mini", [mine], reference)
    assert (compared[0].verdict, compared[0].remark) == (IN_RANGE, "another configuration")
    assert compare(load("mct"), "mini", [make_record("esc@base", 0, 50.0)], reference)[0].remark == ""


def test_strict_says_by_its_status_whether_runs_match(
    project: Path, reference: list[Record], saved: Saved, capsys: Capsys
) -> None:
    def status(*arguments: str) -> int:
        return run("compare", "mct", "--strict", "--runs", str(project / "runs"), *arguments)

    write_results(paper_named("mct"), reference, {})
    (project / "runs").mkdir()
    assert status() == 1  # there is nothing to compare
    saved("esc@base", 0, 51.0, started="2026-02")
    assert status() == 0
    saved("esc@base", 0, 62.0, started="2026-02")
    capsys.readouterr()
    assert status() == 1
    assert "strict: mct, mini: New, ESC 62.0 against 50.0 ± 2.0 is off by 1.2 times" in capsys.readouterr().err
    assert status("--against", str(project / "runs")) == 0  # the runs equal themselves
    assert status("--against", str(project / "none")) == 2


def test_curves_are_promoted(project: Path, saved: Saved) -> None:
    def write(value: float, **fields: object) -> None:
        folder = saved("base", 0, **fields)
        (folder / "metrics.csv").write_text(f"step,name,value\n0,train/loss,9\n1,train/loss,{value}\n")

    runs = project / "runs"
    write(5.0)
    promote("mct", ("mini",), runs)
    curves = project / "papers" / "mct" / "results" / "curves.csv.gz"
    first = curves.read_bytes()
    assert first[4:8] == bytes(4)  # no time stamp, so that equal curves give equal files
    assert gzip.decompress(first).endswith(b"mini,seed0,base,train/loss,0 1,9 5\n")
    (runs / "mct/mini/seed0/base/metrics.csv").unlink()  # like a record that was copied alone
    promote("mct", ("mini",), runs)
    assert curves.read_bytes() == first
    write(4.0, started="2026-02-01T00:00:00Z")
    # A rejected record changes nothing. A promoted record without curves removes the old curves.
    write(3.0, started="2026-03-01T00:00:00Z", git={"revision": "a" * 40, "dirty": True})
    promote("mct", ("mini",), runs)
    assert curves.read_bytes() == first
    write(3.0, started="2026-03-01T00:00:00Z")
    (runs / "mct/mini/seed0/base/metrics.csv").unlink()
    promote("mct", ("mini",), runs)
    assert promoted_curves(paper_named("mct")) == {}
