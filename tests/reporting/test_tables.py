"""Test the tables files: errors that name the place, and the graph of stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from assemble.reporting.papers import existing_papers, paper_named
from assemble.reporting.tables import StageInstance, expand, load
from common.errors import ReportingError
from tests.reporting.conftest import TABLES

AGAIN = "\n  - {id: transfer, title: A, source: b, metrics: {a: {label: a, stage: esc, key: k}}, rows: [{label: A}]}"
CURVE = "curve: {x: a, at: [1, 2], panels: {b: {c: %s}}}\n    title: Transfer"


def ids(instances: list[StageInstance]) -> list[str]:
    return [instance.id for instance in instances]


def rewritten(project: Path, old: str, new: str) -> None:
    assert old in TABLES
    (project / "papers" / "mct" / "tables.yaml").write_text(TABLES.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("title: Transfer", "tilte: Transfer", r"tables\.yaml: .*transfer.*unknown key .tilte.: did .* .title."),
        ("job: probe", "job: prob", r"stages\.esc\.job: unknown value 'prob': did you mean 'probe'"),
        ("model: better", "model: beter", r"rows\[2\]\.model: unknown stage 'beter': did you mean 'better'"),
        ("published: {ucf: 82}", "published: {ucf: high}", r"published\.ucf\.value\S*: expected .* number, got 'high'"),
        ("warm_start: base", "warm_start: bass", r"from\.model\.init_args\.warm_start: unknown stage 'bass'"),
        ("New.ucf + 1", "Now.ucf + 1", r"claims\[0\] .*holds: .Now\.ucf. is not allowed in .*; did you mean .New."),
        ("One helps", "One helps" + " more" * 20, r"claims\[0\] .*text: .*at most 90"),
        ("New.ucf + 1", "`New longer`.ucf + 1", r"transfer.*New longer.*'paper'"),
        ("scales: [mini]", "scales: [minni]", r"scales\[0\]: unknown scale 'minni': did you mean 'mini'"),
        ("label: New-One", "label: New", r"label 'New' occurs twice"),
        ("  esc: {recipe", "  ucf_1: {recipe", r"key 'ucf_1' occurs twice"),
        ("tables:", "tables:" + AGAIN, r"table id 'transfer' occurs twice"),
        ("published: {ucf: 82}", "published: {ucf: [80, 82]}", r"'helps': New-One\.ucf has no published number"),
        ("base, job: pretrain", "base, job: pretrain, from: {x: better}", "start from itself: base -> better -> base"),
        ("from: {model.init_args.warm", "parents: {model.init_args.warm", r"stages\.better: unknown key 'parents'"),
        ("title: Transfer", CURVE % "'New.ucf{x}'", r"curve\.panels\.b\.c\.1\S*: .*'ucf1'"),
        ("    metrics:\n", "    metrics: 3\n    other:\n", r"tables\[0\] .*metrics"),
        ("    rows:\n", "    rows: 5\n    other:\n", r"tables\[0\] .*rows"),
    ],
)  # fmt: skip
def test_errors_name_the_place(project: Path, old: str, new: str, words: str) -> None:
    rewritten(project, old, new)
    with pytest.raises(ReportingError, match=words):
        load("mct")


def test_a_paper_is_known_by_its_folder(project: Path) -> None:
    folder = project / "papers" / "sixth_paper"
    folder.mkdir()
    (folder / "tables.yaml").write_text(
        "# first\npaper:\n  short: sixth\n\n  title: A\n  order: 0\n  recipe: r\nstages: {}\n"
    )
    assert [paper.name for paper in existing_papers()] == ["sixth_paper", "mct"]
    assert paper_named("sixth").root == folder
    assert paper_named("sixth").without_files == {}


def test_a_row_may_be_filled_by_stages_of_its_own(project: Path) -> None:
    """One model can fill several rows, each after different further training."""
    rewritten(project, "model: better,", "model: better, stages: {esc: [ucf_1, esc]},")
    source = load("mct")
    table = source.tables[0]
    row = next(row for row in table.rows if row.stages)
    assert source.instances(table, row, table.metric("esc"), "mini") == ["ucf_1@better", "esc@better"]
    assert source.instances(table, row, table.metric("ucf"), "mini") == ["ucf_1@better"]
    rewritten(project, "model: better,", "model: better, stages: $row,")
    source = load("mct")
    table = source.tables[0]
    assert source.instances(table, table.row("New-One"), table.metric("esc"), "mini") == ["better"]
    assert "esc@better" not in ids(expand("mct", "mini"))
    for stages, words in (("{ecs: esc}", "did you mean 'esc'"), ("{esc: ucf_9}", "unknown stage")):
        rewritten(project, "model: better,", f"model: better, stages: {stages},")
        with pytest.raises(ReportingError, match=words):
            load("mct")


def test_expand_goes_by_the_tables_parents_first(project: Path) -> None:
    mini = expand("mct", "mini")
    assert ids(mini) == ["base", "ucf_1@base", "esc@base", "better", "ucf_1@better", "esc@better"]
    better = next(i for i in mini if i.id == "better")
    assert better.parents == {"model.init_args.warm_start": "base"}
    assert better.row is None
    fine_tune = mini[-2]
    assert fine_tune.row == "better"
    assert fine_tune.stage == "ucf_1"
    assert fine_tune.parents == {"model.init_args.pretrained": "better"}
    assert fine_tune.overrides == {"data.fold": 1}
    assert "ucf_2@base" in ids(expand("mct", "paper"))


def test_expand_selection_pulls_parents_in(project: Path) -> None:
    assert ids(expand("mct", "mini", rows=["New-One"], stages=["esc"])) == ["base", "better", "esc@better"]
    assert ids(expand("mct", "mini", rows=["better"])) == ["base", "better", "ucf_1@better", "esc@better"]
    assert ids(expand("mct", "mini", stages=["ucf_1@base"])) == ["base", "ucf_1@base"]
    assert ids(expand("mct", "mini", tables=["transfer"], rows=["Other"])) == []
    with pytest.raises(ReportingError, match="unknown table 'transfr': did you mean 'transfer'"):
        expand("mct", "mini", tables=["transfr"])
    with pytest.raises(ReportingError, match="unknown row 'Newer'"):
        expand("mct", "mini", rows=["Newer"])
    with pytest.raises(ReportingError, match="unknown stage 'ecs'"):
        expand("mct", "mini", stages=["ecs"])


def test_what_is_made_by_request_runs_when_it_is_named(project: Path) -> None:
    rewritten(project, "model: better,", "model: better, by_request: [mini],")
    without = ["base", "ucf_1@base", "esc@base"]
    whole = [*without, "better", "ucf_1@better", "esc@better"]
    assert ids(expand("mct", "mini")) == whole
    assert ids(expand("mct", "mini", everything=False)) == without
    assert ids(expand("mct", "mini", tables=["transfer"], everything=False)) == whole
    assert ids(expand("mct", "mini", rows=["better"], everything=False)) == ["base", *whole[3:]]
    assert ids(expand("mct", "mini", stages=["esc@better"], everything=False)) == ["base", "better", "esc@better"]
    assert "better" in ids(expand("mct", "paper", everything=False))


def test_stage_missing_at_a_scale(project: Path) -> None:
    rewritten(project, "mini: [ucf_1]", "mini: [ucf_1, ucf_2]")
    with pytest.raises(ReportingError, match="stage 'ucf_2@base' does not exist at scale 'mini'"):
        expand("mct", "mini")
