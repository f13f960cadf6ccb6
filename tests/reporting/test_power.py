"""How many runs separate a gap: against simulated claims and recorded runs that the plan has not seen."""

from __future__ import annotations

import itertools
import random
import statistics
from pathlib import Path

import pytest

from common.commands.main import main
from common.reporting.aggregate import collect
from common.reporting.claims import interval_of
from common.reporting.papers import paper_named
from common.reporting.power import Paired, power_of, runs_for, smallest_gap, spread_range
from common.reporting.results import find_promoted, write_results
from common.reporting.tables import load
from tests.reporting.conftest import Capsys, MakeRecord


def share_above_zero(samples: list[list[float]]) -> float:
    """How many of these sets of differences let a claim hold."""
    intervals = [interval_of(one) for one in samples]
    return statistics.fmean(found is not None and found[0] > 0 for found in intervals)


@pytest.mark.parametrize(("gap", "runs"), [(1.0, 2), (1.0, 6), (1.5, 6), (0.5, 30)])
def test_the_power_is_how_often_a_simulated_claim_holds(gap: float, runs: int) -> None:
    draw = random.Random(0)
    samples = [[draw.gauss(3 * gap, 3.0) for _ in range(runs)] for _ in range(2000)]
    assert power_of(3 * gap, 3.0, runs) == pytest.approx(share_above_zero(samples), abs=0.03)


@pytest.mark.parametrize(("runs", "gap"), [(8, 1.0), (12, 1.0), (8, 1.5)])
def test_half_of_the_recorded_runs_predict_the_other_half(runs: int, gap: float) -> None:
    """All pairs of rows; the mean prediction is within 5 points of the share of held-out resamples that separate."""
    draw = random.Random(0)
    predicted, found = [], []
    for result in collect(load("xmc_gan"), "mini", find_promoted("xmc_gan", "mini")):
        for (row, over), metric in itertools.product(itertools.combinations(result.rows, 2), result.table.metrics):
            differences = Paired(result, metric, row, over).differences
            if len(differences) < 7 or len(set(differences)) < len(differences):
                continue
            draw.shuffle(differences)
            known, unseen = differences[::2], differences[1::2]
            shift, mean = gap * statistics.stdev(differences), statistics.fmean(unseen)
            # Resamples of few values spread less than the values do.
            widened = [shift + (one - mean) * (len(unseen) / (len(unseen) - 1)) ** 0.5 for one in unseen]
            predicted.append(power_of(shift, statistics.stdev(known), runs))
            found.append(share_above_zero([draw.choices(widened, k=runs) for _ in range(50)]))
    assert len(found) > 80
    assert statistics.fmean(predicted) == pytest.approx(statistics.fmean(found), abs=0.05)


def test_runs_and_gap_are_the_smallest() -> None:
    runs = runs_for(1.0, 2.0, 0.8)
    assert power_of(1.0, 2.0, runs) >= 0.8 > power_of(1.0, 2.0, runs - 1)
    assert runs == 34  # two-sided t test with an effect of 0.5, as in any table of sample sizes
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
        (("--power", "1"), "--power is a probability"),
        (("--gap", "nan"), "--gap is a finite number"),
    ):
        assert main([*command, *changed]) == 2
        assert told in capsys.readouterr().err
