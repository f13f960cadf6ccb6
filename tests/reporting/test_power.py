"""Test the number of runs that separates a gap, on simulated claims and on recorded runs that the plan didn't use."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest

from assemble.commands.main import main
from assemble.reporting.claims import interval_of
from assemble.reporting.papers import paper_named
from assemble.reporting.power import power_of, runs_for, smallest_gap, spread_range
from assemble.reporting.results import write_results
from tests.reporting.conftest import Capsys, MakeRecord


@pytest.mark.parametrize(("gap", "runs"), [(1.0, 2), (1.0, 6), (1.5, 6), (0.5, 30)])
def test_the_power_is_how_often_a_simulated_claim_holds(gap: float, runs: int) -> None:
    draw = random.Random(0)
    samples = [[draw.gauss(3 * gap, 3.0) for _ in range(runs)] for _ in range(2000)]
    share = statistics.fmean(found is not None and found[0] > 0 for found in map(interval_of, samples))
    assert power_of(3 * gap, 3.0, runs) == pytest.approx(share, abs=0.03)


def test_runs_and_gap_are_the_smallest() -> None:
    runs = runs_for(1.0, 2.0, 0.8)
    assert power_of(1.0, 2.0, runs) >= 0.8 > power_of(1.0, 2.0, runs - 1)
    assert runs == 34  # matches sample size tables: two-sided t test, effect of 0.5
    assert power_of(smallest_gap(2.0, 7, 0.9), 2.0, 7) == pytest.approx(0.9, abs=1e-6)
    assert runs_for(0.0, 2.0, 0.8) > 10_000
    low, high = spread_range(2.0, 10)
    assert (low, high) == pytest.approx((1.376, 3.651), abs=1e-3)


def test_the_command(project: Path, make_record: MakeRecord, capsys: Capsys) -> None:
    recorded = {"ucf_1@base": (48.0, 52.0), "ucf_1@better": (60.0, 63.0), "esc@base": (20.0,)}
    records = [make_record(stage, k, value) for stage, values in recorded.items() for k, value in enumerate(values)]
    write_results(paper_named("mct"), records, {})
    command = ["power", "mct", "--row", "NEW-one", "--over", "base", "--metric", "UCF"]
    assert main([*command, "--gap", "1"]) == 0
    out = capsys.readouterr().out
    assert "a gap of 1 needs 7 paired runs (95 % range of the spread: 4 to 3,999)\n" in out
    assert "min for 7 runs of 4 stages" in out
    for changed, told in (
        (("--row", "New-Onn"), "unknown row 'New-Onn': did you mean 'New-One'?"),
        (("--metric", "usf"), "no table has 'usf' of NEW-one and base: did you mean 'ucf'?"),
        (("--metric", "esc"), "fewer than two recorded runs"),
        (("--table", "transfr"), "did you mean 'transfer'?"),
        (("--gap", "nan"), "--gap is a finite number"),
    ):
        assert main([*command, *changed]) == 2
        assert told in capsys.readouterr().err
