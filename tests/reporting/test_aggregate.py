"""Test how records are averaged, and which records are left out with a note."""

from __future__ import annotations

from pathlib import Path

import pytest

from assemble.reporting.aggregate import TableResult, collect, deviations_of
from assemble.reporting.draws import Draw
from assemble.reporting.records import Record
from assemble.reporting.tables import load
from tests.reporting.conftest import MakeRecord


def table(scale: str, records: list[Record]) -> TableResult:
    return collect(load("mct"), scale, records)[0]


def test_incomplete_folds_are_not_shown(project: Path, make_record: MakeRecord) -> None:
    result = table("paper", [make_record("ucf_1@base", 0, 10.0, scale="paper")])
    assert result.cells["New", "ucf"].values == {}
    assert result.notes == ("UCF of New, seed 0: 1 of 2 stages recorded; shown when all are",)


def test_scales_and_papers_never_mix(project: Path, make_record: MakeRecord) -> None:
    records = [
        make_record("esc@base", 0, 1.0),
        make_record("esc@base", 1, 2.0, scale="smoke"),
        make_record("esc@base", 2, 3.0, scale="paper"),
        make_record("esc@base", 3, 4.0, paper="m3p"),
    ]
    assert table("mini", records).cells["New", "esc"].values == {Draw(0): 1.0}


def test_newest_configuration_counts_and_the_rest_is_said(project: Path, make_record: MakeRecord) -> None:
    old = make_record("esc@base", 0, 1.0, config={"rate": 1, "seed_everything": 0}, started="2026-01-01T00:00:00Z")
    new = [
        make_record("esc@base", k, 2.0, config={"rate": 2, "seed_everything": k}, started="2026-01-02T00:00:00Z")
        for k in (1, 2)
    ]
    result = table("mini", [*new, old])
    assert result.cells["New", "esc"].values == {Draw(1): 2.0, Draw(2): 2.0}
    assert len(result.notes) == 1
    assert f"seed 0 of `esc@base` is left out: configuration {old.configuration}" in result.notes[0]


def test_measured_on_another_parent(project: Path, make_record: MakeRecord) -> None:
    def child(lineage: str) -> Record:
        return make_record("esc@base", 0, 1.0, parents={"x": {"stage": "base", "lineage_hash": lineage}})

    parent = make_record("base", 0, lineage_hash="current")
    assert table("mini", [parent, child("current")]).cells["New", "esc"].values == {Draw(0): 1.0}
    assert table("mini", [child("old")]).cells["New", "esc"].values == {Draw(0): 1.0}  # no parent's record to compare
    stale = table("mini", [parent, child("old")])
    assert stale.cells["New", "esc"].values == {}
    assert "`base`, which it starts from, was trained again" in stale.notes[0]


@pytest.mark.parametrize("start", [{"digest": "old"}, {}])
def test_measured_on_a_checkpoint_that_was_trained_again(
    start: dict[str, str], project: Path, make_record: MakeRecord
) -> None:
    parent = make_record("base", 0, lineage_hash="current", checkpoints={"best": "b", "last": "new"})
    parents = {"x": {"stage": "base", "lineage_hash": "current", "digest": "new"}}
    assert table("mini", [parent, make_record("esc@base", 0, 1.0, parents=parents)]).measured
    parents = {"x": {"stage": "base", "lineage_hash": "current", **start}}
    stale = table("mini", [parent, make_record("esc@base", 0, 1.0, parents=parents)])
    assert not stale.measured
    assert "`base`, which it starts from, was trained again" in stale.notes[0]


def test_deviations_are_collected_once(project: Path, make_record: MakeRecord) -> None:
    deviation = {"field": "model.estimator", "reason": "small"}
    result = table("mini", [make_record("esc@base", k, deviations=[deviation]) for k in (0, 1)])
    assert deviations_of(result.records) == [deviation]
    # If a reason was reworded, the newest record's words are used.
    worded = {"field": "model.estimator", "reason": "the small one"}
    newer = make_record("esc@base", 2, deviations=[worded], started="2027-01-01T00:00:00Z")
    assert deviations_of([newer, make_record("esc@base", 0, deviations=[deviation])]) == [worded]
