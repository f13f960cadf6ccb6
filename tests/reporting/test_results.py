"""Test the committed results: they are read back as written, survive a kill, and contain nothing unused."""

from __future__ import annotations

import contextlib
import csv
import gzip
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from assemble.commands.main import main
from assemble.reporting.curves import read_table, table_of
from assemble.reporting.papers import existing_papers, paper_named
from assemble.reporting.promote import promote
from assemble.reporting.records import Record, RecordError, config_hash
from assemble.reporting.results import find_promoted, promoted_curves, write_results
from assemble.stages.plan import plan_stages
from assemble.stages.request import Selection
from tests.reporting.conftest import AUTHORS, Capsys, MakeRecord, Save, Saved, a_record, out_of_date
from tests.reporting.test_records import CONFIGS, METRICS

PAPERS = [paper.name for paper in existing_papers()]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): gzip.decompress(data) if path.suffix == ".gz" else data
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".json", ".gz") and path.parent.name != "smoke" and (data := path.read_bytes())
    }


@pytest.mark.parametrize("paper", PAPERS)
def test_committed_results_are_written_as_they_were_read(
    paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that each reference has its content, that each content is used, and that each hash matches its content."""
    entry = paper_named(paper)
    before, records, curves = contents(entry.results), find_promoted(paper), promoted_curves(entry)
    (tmp_path / "papers" / paper).mkdir(parents=True)
    shutil.copy(entry.root / "tables.yaml", tmp_path / "papers" / paper)
    monkeypatch.setenv("ASSEMBLE_ROOT", str(tmp_path))
    copy = paper_named(paper)
    write_results(copy, records, curves)
    assert contents(copy.results) == before
    assert find_promoted(paper) == records


@given(METRICS, CONFIGS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_round_trip(project: Path, metrics: dict[str, float], config: dict[str, Any]) -> None:
    some = [
        a_record(metrics=metrics, config=config, seed=4),
        a_record(
            stage="other", config={"text": "a", "list": [], **config}, seed=4, ours=[{"field": "a", "value": "b"}]
        ),
        a_record(hardware={"peak_memory_gib": 1.5, "isa": {"requested": "avx"}}, media=["a.png"], wandb_run_id="x"),
    ]
    write_results(paper_named("mct"), some, {})
    found = find_promoted("mct")
    assert sorted(found, key=str) == sorted(some, key=str)
    assert sorted(one.to_json() for one in found) == sorted(one.to_json() for one in some)
    written = {path: path.read_bytes() for path in paper_named("mct").results.rglob("*.json")}
    write_results(paper_named("mct"), found, {})  # the records read have sorted keys
    assert written == {path: path.read_bytes() for path in paper_named("mct").results.rglob("*.json")}


class Killed(BaseException):
    """Replacement for SIGKILL."""


@pytest.mark.parametrize("operation", ["replace", "fsync"])
def test_a_promotion_that_is_killed_leaves_results_that_can_be_read_and_is_completed_by_the_next(
    operation: str, project: Path, make_record: MakeRecord, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(rate: float, value: float, started: str) -> list[Record]:
        some = [
            make_record("esc@base", seed, value + seed, config={"rate": {"is": rate}}, started=started)
            for seed in (0, 1)
        ]
        for record in some:
            (save(record) / "metrics.csv").write_text(f"step,name,value\n0,train/loss,9\n1,train/loss,{value}\n")
        return some

    results = paper_named("mct").results
    old = run(0.1, 50.0, "2026-01-01T00:00:00Z")
    promote("mct")
    shutil.copytree(results, project / "old")
    new = run(0.2, 60.0, "2026-01-02T00:00:00Z")
    promote("mct")
    whole = contents(results)
    genuine = getattr(os, operation)
    for kill_at in range(100):
        shutil.rmtree(results)
        shutil.copytree(project / "old", results)
        left = iter(range(kill_at))

        def until_killed(*arguments: Any, left: Iterator[int] = left) -> Any:
            if next(left, None) is None:
                raise Killed
            return genuine(*arguments)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, operation, until_killed)
            promote("mct")
            break
        (results / "mini" / ".seed0.0f3a8c11.1.tmp.json").write_text("{")  # a leftover of SIGKILL
        for record, before, after in zip(find_promoted("mct"), old, new, strict=True):
            assert record in (before, after)
        assert promoted_curves(paper_named("mct"))
        out_of_date()
        promote("mct")
        assert {name: data for name, data in contents(results).items() if "/." not in name} == whole
    assert kill_at >= 5


def test_a_draw_of_another_machine_is_not_overwritten(saved: Saved, capsys: Capsys) -> None:
    def run(cpu: str, value: float, day: int) -> int:
        hardware = {"cpu": cpu, "isa": {"requested": "native", "machine": "avx2"}}
        saved("esc@base", 0, value, hardware=hardware, started=f"2026-01-0{day}T00:00:00Z")
        return main(["promote", "mct", *(["--replace"] if day == 4 else [])])

    assert run("Old CPU", 50.0, 1) == 0
    assert run("Old CPU", 51.0, 2) == 0
    capsys.readouterr()
    assert run("New CPU", 52.0, 3) == 1
    told = capsys.readouterr().out
    assert all(word in told for word in ("seed 0", "Old CPU (avx2)", "New CPU (avx2)", "--replace"))
    assert [record.metrics["test/top1"] for record in find_promoted("mct")] == [51.0]
    assert run("New CPU", 53.0, 4) == 0
    assert [record.metrics["test/top1"] for record in find_promoted("mct")] == [53.0]


def damaged(name: str, text: str) -> Callable[[Path], None]:
    return lambda results: (results / name).write_text(text, encoding="utf-8") and None


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("seed0.json", damaged("mini/seed0.json", "{")),
        ("seed0.json", damaged("mini/seed0.json", '{"paper": "mct", "scale": "mini", "seed": 0, "schema": 1}')),
        ("seed0.json", lambda results: (results / "shared.json").unlink()),
        ("shared.json", damaged("shared.json", '{"config": 5}')),
        ("seed1.json", lambda results: (results / "mini/seed0.json").rename(results / "mini/seed1.json") and None),
    ],
)
def test_a_malformed_file_is_named(file: str, damage: Callable[[Path], None], saved: Saved) -> None:
    saved("esc@base", 0)
    promote("mct")
    damage(paper_named("mct").results)
    with pytest.raises(RecordError, match=file):
        find_promoted("mct")


def test_a_curve_may_have_more_points_than_fit_into_a_field_of_csv_by_default(tmp_path: Path) -> None:
    curves = {("mini", "seed0", "avid"): {"train/loss": [(float(step), float(step)) for step in range(30_000)]}}
    (tmp_path / "curves.csv.gz").write_bytes(table_of(curves))
    csv.field_size_limit(131_072)  # the default
    assert read_table(tmp_path / "curves.csv.gz") == curves


def test_a_damaged_table_of_curves_is_named_and_not_replaced(saved: Saved) -> None:
    (saved("esc@base", 0) / "metrics.csv").write_text("step,name,value\n0,a,1\n1,a,2\n")
    promote("mct")
    path = paper_named("mct").results / "curves.csv.gz"
    path.write_bytes(damaged := path.read_bytes()[:-9])
    with pytest.raises(RecordError, match=path.name):
        promote("mct")
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("paper", PAPERS)
def test_hashes_follow_from_the_stored_configuration(paper: str) -> None:
    found = find_promoted(paper)
    lineages = {(r.scale, r.seed, r.stage): r.lineage_hash for r in found}
    for record in found:
        assert config_hash(record.config) == record.config_hash, record.stage
        for parent in record.parents.values():
            assert lineages[record.scale, record.seed, parent["stage"]] == parent["lineage_hash"], record.stage


@pytest.mark.parametrize("paper", PAPERS)
def test_records_are_of_the_stages_as_they_are_configured_now(paper: str) -> None:
    found = {(r.scale, r.seed, r.stage): r for r in find_promoted(paper)}
    nowhere = Path("/nonexistent")
    for scale, seed in sorted({key[:2] for key in found}):
        for stage in plan_stages(
            paper, Selection(scale=scale, seeds=(seed,), runs=nowhere, data=nowhere, everything=True)
        ):
            record = found.pop((scale, seed, stage.request.stage), None)
            assert record is None or record.lineage_hash == stage.request.lineage, stage.request.stage
    assert not found, f"no stage of these is left: {sorted(found)}"


def test_records_of_the_authors_weights_are_promoted_into_a_file_of_their_own(
    project: Path, saved: Saved, capsys: Capsys
) -> None:
    saved("ucf_1@base", 0, 79.0, scale="paper")
    for seed in (0, 1):
        saved("ucf_1@base", seed, 81.0, scale="paper", given=AUTHORS)
    saved("esc@base", scale="paper", given={"base": {"file": "mine.ckpt", "sha256": "cd" * 32}})
    assert main(["promote", "mct"]) == 0
    out = capsys.readouterr().out
    assert "kept: mct/paper/seed0-given/esc@base: not promoted, since it starts from a file of yours" in out
    results = project / "papers" / "mct" / "results" / "paper"
    assert {path.name for path in results.glob("*.json")} == {"seed0.json", "released.json"}
    kept = find_promoted("mct")
    assert [(one.seed, one.metrics["test/top1"], one.given) for one in kept] == [
        (0, 79.0, {}), (0, 81.0, AUTHORS), (1, 81.0, AUTHORS),
    ]  # fmt: skip
    assert main(["promote", "mct"]) == 0
    assert capsys.readouterr().out.count("unchanged") == 3
    assert find_promoted("mct") == kept
