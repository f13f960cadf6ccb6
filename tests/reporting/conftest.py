"""Make made-up papers and records in a temporary project. None of the numbers was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assemble.reporting import records, render
from assemble.reporting.papers import existing_papers
from assemble.reporting.records import Record

TABLES = """
paper: {short: mct, title: MCT, about: contrast, order: 1, recipe: base}
stages:
  base: {recipe: base, job: pretrain}
  better: {recipe: better, job: pretrain, from: {model.init_args.warm_start: base}}
  ucf_1: {recipe: ucf, job: fine_tune, set: {data.fold: 1}, from: {model.init_args.pretrained: $row}}
  ucf_2: {recipe: ucf, job: fine_tune, set: {data.fold: 2}, from: {model.init_args.pretrained: $row}, scales: [paper]}
  esc: {recipe: esc, job: probe, from: {model.init_args.pretrained: $row}}
tables:
  - id: transfer
    title: Transfer
    source: a made-up page
    metrics:
      ucf: {label: UCF, stages: {paper: [ucf_1, ucf_2], mini: [ucf_1], smoke: [ucf_1]}, key: test/top1, unit: "%"}
      esc: {label: ESC, stage: esc, key: test/top1}
      loss: {label: loss, stage: $row, key: test/loss, better: down, hidden: true}
    rows:
      - {label: Other, published: {ucf: 80.0}}
      - label: New
        model: base
        published: {ucf: 81.5, esc: {value: 70, mark: "*"}}
        expected: {ucf: {values: [79.0], spread: 0.5, source: a rerun}}
      - {label: New-One, model: better, published: {ucf: 82}}
      - {label: New longer, model: base, ours: true, scales: [mini]}
    notes: ["(*) a slip [sic]"]
    claims:
      - {id: helps, text: One helps, holds: "New-One.ucf >= New.ucf + 1"}
    checks:
      - {id: learns, text: Loss is low, holds: "New.loss < 5 and New.loss > 0"}
"""

README = """\
# MCT

before
<!-- begin:claims -->
<!-- end:claims -->
<!-- begin:tables -->
<!-- end:tables -->
after
"""

#: The field of a record that starts from the authors' weights.
AUTHORS = {"base": {"file": "base.pth", "sha256": "ab" * 32, "source": "https://example.org"}}

Capsys = pytest.CaptureFixture[str]
MakeRecord = Callable[..., Record]
Save = Callable[[Record], Path]
Saved = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a project with one paper, mct, and README files with markers."""
    root = tmp_path / "project"
    paper = root / "papers" / "mct"
    paper.mkdir(parents=True)
    (paper / "tables.yaml").write_text(TABLES)
    (paper / "README.md").write_text(README)
    (root / "README.md").write_text("# Top\n<!-- begin:overview -->\n<!-- end:overview -->\n")
    monkeypatch.setenv("ASSEMBLE_ROOT", str(root))
    return root


def a_record(stage: str = "esc@base", seed: int = 0, value: float = 50.0, **fields: Any) -> Record:
    """Make a valid record. Keyword arguments replace the record's fields."""
    config = fields.pop("config", {"seed_everything": seed, "model": {"rate": 0.1}, "data": {"root": "/somewhere"}})
    values: dict[str, Any] = {
        "paper": "mct",
        "stage": stage,
        "recipe": stage.split("@")[0],
        "job": "probe",
        "row": stage.split("@")[1] if "@" in stage else None,
        "scale": "mini",
        "seed": seed,
        "metrics": {"test/top1": value},
        "config_hash": records.config_hash(config),
        "lineage_hash": "0" * 12,
        "config": config,
        "git": {"revision": "a" * 40, "dirty": False},
        "started": "2026-01-02T03:04:05Z",
        "hardware": {"cpu": "Some CPU", "cores": 2, "memory_gib": 4.0, "accelerators": []},
        "wall_seconds": 60.0,
    }
    return Record(**(values | fields))


@pytest.fixture
def make_record() -> MakeRecord:
    return a_record


@pytest.fixture
def save(project: Path) -> Save:
    """Return a function that writes a record into the project's runs."""

    def write(record: Record) -> Path:
        folder = record.folder(project / "runs")
        records.write(folder / records.RECORD_FILE, record)
        return folder

    return write


@pytest.fixture
def saved(save: Save, make_record: MakeRecord) -> Saved:
    """Return a function that makes a record, writes it into the project's runs, and returns the record's folder."""
    return lambda *arguments, **fields: save(make_record(*arguments, **fields))


def out_of_date() -> list[Path]:
    return [*render.stale(render.pages(existing_papers()))]


def rendered() -> list[Path]:
    return render.write(render.pages(existing_papers()))
