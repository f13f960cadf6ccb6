"""Test where and why training curves leave the band of the recorded runs, on recorded, made-up and trained runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assemble.reporting.curves import Curves
from assemble.reporting.divergence import Band, Divergence, RunWithCurves, differences, diverging, recorded
from assemble.reporting.papers import existing_papers, paper_named
from assemble.reporting.records import Record
from assemble.reporting.results import place_of, write_results
from tests.reporting.conftest import Capsys, MakeRecord, Saved
from tests.reporting.test_commands import run

STEPS = range(10, 670, 10)
DATA = {"training": {"samples": 60, "skipped": 0, "fingerprint": "f0"}}
LOSS = "papers/mct/loss.py"
LIKE: dict[str, Any] = {"data": DATA, "versions": {"torch": "2.14"}, "code": {LOSS: "c0:t0"}}
UCF: dict[str, Any] = {"parents": {"model.init_args.pretrained": {"stage": "base", "lineage_hash": "0" * 12}}}


def curve(seed: int, leaves: int = 10**9) -> Curves:
    """Make a loss that falls from 4 to 1 with 3 % noise, and that doubles at the step `leaves`."""
    noise = np.random.default_rng(seed).normal(1, 0.03, len(STEPS))
    return {
        "train/loss": [
            (step, float((1 + 3 * np.exp(-step / 200)) * noisy * (1 + (step >= leaves))))
            for step, noisy in zip(STEPS, noise)
        ]
    }


def write_curve(folder: Path, curves: Curves) -> None:
    rows = [f"{step},{name},{value}\n" for name, points in curves.items() for step, value in points]
    (folder / "metrics.csv").write_text("step,name,value\n" + "".join(rows))


@pytest.fixture
def reference(project: Path, make_record: MakeRecord) -> list[Record]:
    records = [make_record("base", seed, **LIKE) for seed in range(6)]
    records += [make_record("ucf_1@base", seed, **LIKE, **UCF) for seed in range(6)]
    write_results(paper_named("mct"), records, {place_of(one): curve(place) for place, one in enumerate(records)})
    return records


def test_nine_of_ten_recorded_runs_stay_inside_the_band_of_the_others() -> None:
    found: list[Divergence] = []
    for paper in existing_papers():
        runs = recorded(paper, "mini", None)
        found += [dataclasses.replace(one, stage=f"{paper.name}/{one.stage}") for one in diverging(runs, runs)]
    assert not any(one.explained for one in found)
    draws = {(one.stage.partition("/")[0], one.draw) for one in found}
    left = {(one.stage.partition("/")[0], one.draw) for one in found if one.reported}
    assert len(draws) > 60
    assert len(left) <= 0.1 * len(draws)


RATE = {"config": {"seed_everything": 7, "model": {"rate": 0.2}, "data": {"root": "/elsewhere"}}}


@pytest.mark.parametrize(
    ("changed", "leaves", "reason"),
    [
        ({}, None, None),
        # If the curves stay inside the band, no difference from the recorded runs is reported.
        ({"code": {LOSS: "c1:t1"}, "versions": {"torch": "2.11"}}, None, None),
        ({"code": {LOSS: "c0:t1"}, "git": {"revision": "b" * 40, "dirty": True}}, 400, "chance"),
        ({}, 400, "chance"),
        ({"hardware": {"isa": {"requested": "avx", "machine": "avx2"}}}, 400,
         "instruction set: instructions avx, recorded unset"),
        ({"versions": {"torch": "2.11"}}, 400, "library versions: torch 2.11, recorded 2.14"),
        ({"code": {LOSS: "c1:t1"}}, 400, f"code: {LOSS} changed"),
        ({"code": {LOSS: "c1:t1"}, "git": {"revision": "a" * 40, "dirty": True}}, None,
         f"code: {LOSS} changed; uncommitted changes"),
        ({"code": {}, "git": {"revision": "b" * 40, "dirty": False}}, 400, "chance"),
        ({"code": {}, "git": {"revision": "a" * 40, "dirty": True}}, None, "code: uncommitted changes"),
        ({**RATE, "versions": {"torch": "2.11"}}, 400, "configuration: model.rate 0.2, recorded 0.1"),
        (RATE, None, "configuration: model.rate 0.2, recorded 0.1"),
        ({**RATE, "data": {"training": {"samples": 30, "skipped": 9, "fingerprint": "f1"}}}, 400,
         "data: training: samples 30, recorded 60; training: skipped 9, recorded 0; 1 more"),
        ({"data": {"training": {**DATA["training"], "skipped": 9, "fingerprint": "f1"}}}, None,
         "data: training: skipped 9, recorded 0; training: fingerprint f1, recorded f0"),
    ],
)  # fmt: skip
def test_the_first_cause_in_order(
    changed: dict[str, Any], leaves: int | None, reason: str | None, make_record: MakeRecord, reference: list[Record]
) -> None:
    mine = [(make_record("base+1f2e3d", 7, **{**LIKE, "started": "2026-02", **changed}), curve(99, leaves or 10**9))]
    (found,) = diverging(mine, recorded(paper_named("mct"), "mini", None))
    assert found.reported == (reason is not None)
    assert found.step is None if leaves is None else abs(found.step - leaves) <= 20
    if reason:
        assert found.reason == reason


def test_what_the_recorded_runs_have_is_told_up_to_two_values(make_record: MakeRecord) -> None:
    def told(*rates: int | None) -> str | None:
        mine, *others = (make_record("base", 7, config={"seed_everything": 0, "rate": rate}) for rate in (9, *rates))
        return differences(mine, others).get("configuration")

    assert [told(1), told(1, 2), told(3, 1, 2), told(1, 9), told(None)] == [
        "rate 9, recorded 1", "rate 9, recorded 1 or 2", "rate 9, recorded 3 or 1 or others", None,
        "rate 9, recorded unset",
    ]  # fmt: skip


def test_a_window_is_outside_beyond_the_interval_of_its_neighbors_variance() -> None:
    def left(values: list[list[float]], mine: list[float], cells: int = 1, size: int = 1) -> float | None:
        steps = [float(step) for step in range(1, len(mine) + 1)]
        return Band(steps, np.array(values), size).left_by(list(zip(steps, mine)), cells)

    # The limit is Student's t of four degrees of freedom (2.776, or 5.598 for ten windows) times the root of 1 + 1 / 3.
    spread = [[-1.0], [0.0], [1.0]]
    assert [left(spread, [x]) for x in (3.2, -3.2, 3.21, -3.21)] == [None, None, 1, 1]
    assert [left(spread, [x], 10) for x in (6.46, 6.47)] == [None, 1]
    # If all values are positive, the band is computed from their logarithms.
    assert [left(np.exp(spread).tolist(), [float(np.exp(x))]) for x in (3.2, 3.21)] == [None, 1]
    # There are nine windows of two steps. Only the fifth varies, and its variance is averaged over seven windows.
    wide = [[0.0] * 4 + [x] + [0.0] * 4 for x in (-1.0, 0.0, 1.0)]
    moved = [[0.0] * 2 * k + [1.2, 1.2] + [0.0] * 2 * (8 - k) for k in range(9)]
    assert [left(wide, mine, size=2) for mine in moved] == [1, *[None] * 7, 17]
    assert left(wide, [0.0] * 8 + [1.22] * 10, size=2) == 9


def test_how_often_a_run_logs_changes_nothing(make_record: MakeRecord, reference: list[Record]) -> None:
    loss = curve(99)["train/loss"]
    often = {"train/loss": sorted([*loss, *((step + 5, 100 * value) for step, value in loss)])}
    mine = make_record("base", 7, **{**LIKE, "started": "2026-02"})
    (found,) = diverging([(mine, often)], recorded(paper_named("mct"), "mini", None))
    assert not found.reported


def test_data_of_a_seed_are_compared_with_the_same_seed(make_record: MakeRecord) -> None:
    def one(seed: int, fingerprint: str, started: str) -> RunWithCurves:
        data = {"training": {"samples": 60, "fingerprint": fingerprint}}
        return make_record("base", seed, data=data, started=started), curve(seed)

    others = [one(seed, f"f{seed}", "2026-01") for seed in range(4)]
    causes = [diverging([one(*mine, "2026-02")], others)[0].cause for mine in ((7, "f7"), (2, "f2"), (2, "f7"))]
    assert causes == ["chance", "chance", "data"]


def test_what_the_command_prints(saved: Saved, reference: list[Record], project: Path, capsys: Capsys) -> None:
    def told(*arguments: str) -> tuple[int, str]:
        status = run("compare", "mct", "--curves", "--runs", str(project / "runs"), *arguments)
        return status, " ".join(capsys.readouterr().out.split())

    fields = {**LIKE, "started": "2026-02"}
    write_curve(saved("base", 7, **fields), curve(70))
    write_curve(saved("ucf_1@base", 7, **{**fields, **UCF, "started": "2026-03"}), curve(71))
    assert told("--strict") == (
        0,
        "MCT, mini 2 of 2 stages stay inside the band, so their differences are within chance "
        "code: the same as in the recorded runs",
    )  # fmt: skip
    write_curve(saved("base", 7, **{**fields, "code": {LOSS: "c1:t1"}}), curve(70, 510))
    short = {"train/loss": curve(71)["train/loss"][:60]}
    write_curve(saved("ucf_1@base", 7, **{**fields, **UCF, "started": "2026-03"}), short)
    status, out = told("--strict")
    assert status == 1
    assert f"base 7 step 490 of 660, train/loss code: {LOSS} changed" in out
    assert out.endswith(f"code: {LOSS} changed since the recorded runs")
    assert "ucf_1@base 7 step 610 of 660, train/loss parent: starts from base" in out
    assert "0 of 2 stages stay inside the band" in out
    write_results(paper_named("mct"), reference, {})
    status, out = told("--strict")
    assert status == 1
    assert "cannot be judged: fewer than 3 recorded runs have curves" in out
    assert "no curves to compare at" in out
