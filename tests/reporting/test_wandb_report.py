"""Test the W&B reports: their content, read back from the files, and that a missing network only costs seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assemble.reporting import wandb_report, wandb_server
from assemble.reporting.papers import existing_papers
from assemble.reporting.render import fill_best, row_text
from assemble.reporting.results import find_promoted
from assemble.reporting.tables import load
from tests.machine import LONG
from tests.reporting.conftest import Capsys, MakeRecord, Saved
from tests.reporting.test_commands import run
from tests.wandb_stub import KEY, WandbStub, forget, serving

Spec = dict[str, Any]
VIEW = "MCT: table, mini"


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide the machine's W&B key, and drop the client's cached settings."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(wandb_server, "PATIENCE_SECONDS", LONG)
    monkeypatch.setattr(wandb_report, "SEND_SECONDS", LONG)
    forget()
    yield
    forget()


def filters(runset: Spec) -> dict[str, tuple[str, Any]]:
    return {f["key"]["name"]: (f["op"], f["value"]) for f in runset["filters"]["filters"]}


@pytest.mark.parametrize("paper", existing_papers(), ids=lambda paper: paper.name)
def test_a_bar_is_over_the_stages_of_its_own_row(paper: Any, tmp_path: Path) -> None:
    records = find_promoted(paper.name)
    source, measured = load(paper.name), [f for f in fill_best(load(paper.name), records) if f.result.measured]
    wandb_report.write(wandb_report.paper_report(paper, records), tmp_path / "report.json")
    blocks = json.loads((tmp_path / "report.json").read_text())["spec"]["blocks"]
    grids = [block for block in blocks if block["type"] == "panel-grid"]
    assert len(grids) == (len(measured) + 3 if records else 0)  # plus training, media and configurations
    for f, grid in zip(measured, grids):
        table, scale = f.result.table, f.result.scale
        shown = [m for m in table.metrics if not m.hidden]
        for runset in grid["metadata"]["runSets"]:
            row = next(r for r in f.result.rows if runset["name"] == row_text(r))
            _, stages = filters(runset)["stage"]
            mine = {m.id: set(source.instances(table, row, m, scale)) for m in shown}
            assert set(stages) <= set().union(*mine.values())
            # A bar is the mean of all runs in the set that have its key, so all of them must belong to the row's cells.
            for m in shown:
                logged = {s for r in f.result.rows for s in source.instances(table, r, m, scale)}
                assert not mine[m.id] or set(stages) & logged <= mine[m.id]
            if len({r.model for r in f.result.rows}) == len(f.result.rows):
                assert set(stages) == set().union(*mine.values())


def test_without_a_key_the_reports_are_files(project: Path, saved: Saved, capsys: Capsys) -> None:
    saved("esc@base")
    assert run("wandb-report", "--runs", str(project / "runs")) == 0
    out = capsys.readouterr().out
    assert "not sent: no key" in out
    path = project / "runs" / "mct" / "wandb-report.json"
    assert f"wrote: {path}" in out
    assert json.loads(path.read_text())["spec"]["blocks"]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    """Start a server, and set its key in the environment."""
    with serving() as found:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_PROJECT", "WANDB_ENTITY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", found.address)
        forget()
        yield found
        assert not found.unknown


def test_a_report_is_updated_in_its_place(project: Path, stub: WandbStub, saved: Saved, capsys: Capsys) -> None:
    def sent() -> list[str]:
        return [name for name, view in stub.views.items() if view["displayName"] != VIEW]

    assert run("wandb-report", "mct") == 0
    (first,) = sent()
    address = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sent: "))
    saved("esc@base", 0, 61.5)
    assert run("wandb-report", "mct", "--runs", str(project / "runs")) == 0
    assert address in capsys.readouterr().out
    assert sent() == [first]
    assert "61.5" in stub.views[first]["spec"]
    stub.views.clear()  # as if somebody deleted the report
    assert run("wandb-report", "mct") == 0
    assert len(sent()) == 1


def test_a_view_has_one_scale(project: Path, make_record: MakeRecord) -> None:
    records = [make_record(), make_record(scale="paper")]
    view = wandb_report.paper_workspace(existing_papers()[0], records, "someone")
    assert view is not None
    assert [section.name for section in view.sections].count("Transfer") == 1


def test_the_view_of_a_paper_is_its_table(project: Path, stub: WandbStub, saved: Saved, capsys: Capsys) -> None:
    saved("esc@base", 0, 61.5, media=["media/neighbors.png", "media/texts.csv"])
    for _ in range(2):  # the second run replaces the view
        assert run("wandb-report", "mct", "--runs", str(project / "runs")) == 0
        assert f"sent: {stub.address}/someone/representation-assemble?nw=" in capsys.readouterr().out
    (view,) = [view for view in stub.views.values() if view["displayName"] == VIEW]
    section = json.loads(view["spec"])["section"]
    (runset,) = section["runSets"]
    assert filters(runset) == {"paper": ("=", "mct"), "scale": ("=", "mini")}
    assert [key["name"] for key in runset["grouping"]] == ["stage.value"]  # two rows share a model
    pinned = [name for name, on in runset["runFeed"]["columnPinned"].items() if on]
    assert pinned == ["run:displayName", "summary:table/transfer/ucf", "summary:table/transfer/esc"]
    sections = section["panelBankConfig"]["sections"]
    assert section["settings"]["xAxis"] == "trainer/global_step"
    shown = {part["name"]: (part["isOpen"], [panel["config"] for panel in part["panels"]]) for part in sections}
    assert list(shown) == ["Transfer", "Training", "Pictures, clips and texts"]
    drawn = {"vertical": False, "groupAgg": "mean", "groupArea": "stddev"}
    metrics = {name: [f"summary_metrics.table/transfer/{name.lower()}"] for name in ("UCF", "ESC")}
    assert shown["Transfer"] == (True, [{"chartTitle": name, "metrics": metrics[name], **drawn} for name in metrics])
    assert [(is_open, panel["chartTitle"]) for is_open, (panel, *_) in list(shown.values())[1:]] == [
        (False, "Training loss"), (False, "neighbors"),
    ]  # fmt: skip
