"""Test rendering: Markdown between markers, the overview, and the check of committed pages."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from assemble.commands.main import main
from assemble.reporting import render, report
from assemble.reporting.records import Record
from assemble.reporting.render import marked, write
from assemble.reporting.tables import load, summary
from tests.reporting.conftest import AUTHORS, Capsys, MakeRecord, Saved

CLAIMS = """\
| claim | paper | mini (95 %) | verdict |
|---|---:|---:|---|
| One helps | +0.5 | +11 (+11 to +11; n=2) | holds |

Of 1 checks of ours, 0 hold. The others:

- Loss is low: 13 (n=1; rounding alone: 8) in loss: New, sign differs

*Rounding alone* moves one seed's margin by more than half of the mean; the intervals count it."""


@pytest.fixture
def some_records(make_record: MakeRecord) -> list[Record]:
    deviation = {"field": "model.estimator", "reason": "the small bank"}
    return [
        make_record("ucf_1@base", 0, 49.0),
        make_record("ucf_1@base", 1, 51.0),
        make_record("ucf_1@better", 0, 60.0, deviations=[deviation]),
        make_record("ucf_1@better", 1, 62.0),
        make_record("esc@base", 0, 30.0, git={"revision": "b" * 40, "dirty": True}),
    ]


def test_checks_that_do_not_hold_are_listed_below_the_claims(
    project: Path, some_records: list[Record], make_record: MakeRecord
) -> None:
    loss = make_record("base", 0, metrics={"test/loss": 9.0})
    rounded = replace(loss, metrics={"test/loss": 17.0}, hardware={"isa": {"requested": "avx2", "machine": "avx2"}})
    assert render.claims_markdown(render.fill(load("mct"), "mini", [*some_records, loss, rounded])) == CLAIMS


def test_a_row_with_fewer_draws_says_so_once_and_a_note_of_two_tables_too(
    project: Path, make_record: MakeRecord
) -> None:
    tables = project / "papers" / "mct" / "tables.yaml"
    text = tables.read_text()
    tables.write_text(text + text[text.index("  - id: transfer") :].replace("transfer", "again"))
    records = [make_record("ucf_1@base", seed, 50.0) for seed in (0, 1)] + [make_record("ucf_1@better", 0, 60.0)]
    shown = render.tables_markdown(render.fill(load("mct"), "mini", records))
    assert "| New-One (n=1) | 60.0 |" in shown  # the table leaves out the column without values
    assert shown.count("a slip") == 1


def test_what_has_no_published_value_is_never_taken_for_one(project: Path, make_record: MakeRecord) -> None:
    tables = project / "papers" / "mct" / "tables.yaml"
    text = tables.read_text()

    def drawn() -> str:
        return render.table_markdown(
            render.fill(load("mct"), "paper", [make_record(value=30.0, scale="paper")])[0].result
        )

    assert "| New | 81.5 / – | 70.0 (*) / 30.0 |" in drawn()
    tables.write_text(text.replace("esc: {label: ESC, stage: esc", "esc: {published: false, label: ESC, stage: esc"))
    assert "| New | 81.5 / – | – / 30.0 |" in drawn()
    # In our own table, a metric counts as published if any row has a published value.
    ours = text.replace("source: a made-up page", "source: ours alone\n    ours: true")
    tables.write_text(ours.replace(', esc: {value: 70, mark: "*"}', ""))
    assert "Cells are *published / measured*" in drawn()
    assert "| New | 81.5 / – | – / 30.0 |" in drawn()


def test_a_page_names_a_table_by_request_of_one_draw(project: Path, make_record: MakeRecord) -> None:
    (judged,) = render.fill(load("mct"), "mini", [make_record("ucf_1@base", 0, 49.0)])
    table = judged.result.table.model_copy(update={"by_request": ("mini",)})
    filled = [render.Filled(replace(judged.result, table=table), [], [])]
    assert "### Transfer (mini)" in render.tables_markdown(filled)
    assert render.tables_markdown(filled, minor_tables=False).endswith("also prints small tables: Transfer.")
    shown = render.tables_markdown([judged], minor_tables=False)
    assert shown.index("### Transfer (mini)") < shown.index("a slip")
    unmeasured = table.model_copy(update={"rows": table.rows[:1]})  # such as human preference
    for part, waits in ((table, True), (unmeasured, False)):
        result = replace(judged.result, table=part, cells={})
        assert ("Not measured yet: Transfer" in render.tables_markdown([render.Filled(result, [], [])])) == waits


def test_markers_are_idempotent(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- begin:x -->old<!-- end:x -->\nb\n<!-- begin:y -->\n<!-- end:y -->\n")
    assert write({path: marked(path, x="new | text\n\\1")})
    once = "a\n<!-- begin:x -->\nnew | text\n\\1\n<!-- end:x -->\nb\n<!-- begin:y -->\n<!-- end:y -->\n"
    assert path.read_text() == once
    assert not write({path: marked(path, x="new | text\n\\1")})


def test_cells_from_given_weights_are_marked_and_never_mixed_with_ours(
    project: Path, saved: Saved, capsys: Capsys
) -> None:
    for split, value in ((1, 79.0), (2, 81.0)):
        saved(f"ucf_{split}@base", 0, value - 50, scale="paper")  # our own weights
        saved(f"ucf_{split}@base", 0, value, scale="paper", given=AUTHORS)
        saved(f"ucf_{split}@better", 0, value + 4, scale="paper", given=AUTHORS)
    runs = ["--runs", str(project / "runs")]
    filled = render.fill_both(load("mct"), "paper", render.records_of("mct", project / "runs"))
    ours, theirs = (render.table_markdown(f.result) for f in filled)
    assert "| New | 81.5 / 30.0 |" in ours
    assert "†" not in ours
    assert "### Transfer, from the authors' weights" in theirs
    assert "| New | 81.5 / 80.0 † / -1.5, as expected |" in theirs
    assert "| New-One | 82.0 / 84.0 † / +2.0 |" in theirs
    assert "authors' weights, which we did not pre-train: base.pth (SHA-256 abababababab)." in theirs
    assert "- UCF of New: expected 78.0 to 82.5 (a rerun)." in theirs
    claims = render.claims_markdown(filled)
    assert "| claim | paper | from the authors' weights (95 %) | verdict |" in claims
    assert "| One helps | +0.5 | +4 (n=1) | sign agrees |" in claims
    assert main(["tables", "mct", "--scale", "paper", *runs]) == 0
    assert "Transfer, from the authors' weights (paper)" in capsys.readouterr().out
    assert "81.5 / 80.0 † / -1.5" in " ".join(printed_table(filled[-1]).split())
    assert "Cells are published / measured / difference." in " ".join(printed_table(filled[-1]).split())
    assert "…" not in printed_table(filled[-1])
    assert main(["claims", "mct", "--scale", "paper", *runs]) == 0
    assert "ours (95" not in capsys.readouterr().out
    page = report.page(["mct"], None, project / "runs")
    assert "Transfer, from the authors&#39; weights" in page
    assert page.count(">84.0 †</button>") == 1
    # If the file is not the authors', the table says "from given weights".
    saved("ucf_1@base", 0, 79.0, scale="paper", given={"base": {"file": "mine.ckpt", "sha256": "cd" * 32}})
    filled = render.fill_both(load("mct"), "paper", render.records_of("mct", project / "runs"))
    assert filled[-1].result.origin == "from given weights"


def printed_table(filled: render.Filled) -> str:
    stream = io.StringIO()
    render.print_table(filled, Console(width=60, file=stream), measured_only=True)
    return stream.getvalue()


def test_wandb_keeps_cells_from_given_weights_apart() -> None:
    metrics, source = {"test/video_top1": 85.0}, load("avid_cma")
    ours, given = (summary(source, "ucf_1@avid", "paper", metrics, stages) for stages in ((), ["avid"]))
    assert ours["table/kinetics_transfer/ucf"] == given["given/kinetics_transfer/ucf"] == 85.0
    assert not ours.keys() & given.keys()
