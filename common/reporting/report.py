"""One self-contained page: claims, tables, charts, training curves, pictures, clips, provenance.

It needs no network, and its script only adds convenience.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.reporting import charts, render
from common.reporting.aggregate import Cell
from common.reporting.claims import FAILS, HOLDS, NOT_RUN, NOT_SEPARABLE, VERDICTS, Judged
from common.reporting.curves import band_of, importance, read_curves
from common.reporting.media import Budget, Gallery, comparisons, gallery
from common.reporting.papers import SCALES, Paper, check_scale, existing_papers, paper_named, project_root, runs_root
from common.reporting.records import (
    RECORD_FILE,
    Record,
    short_name,
    warn_of,
)
from common.reporting.results import draw_file, find_promoted, place_of, promoted_curves
from common.reporting.runs import DAMAGED, RUNNING, Run, find_runs
from common.reporting.tables import Tables, load

MARKS = {HOLDS: "✓", FAILS: "✗", NOT_SEPARABLE: "≈", NOT_RUN: "–"}


def build(
    output: Path, papers: Sequence[str] | None = None, scale: str | None = None, runs: Path | None = None
) -> Path:
    """Write the report page, see `page`; return its file."""
    write_atomically(Path(output), page(papers, scale, runs))
    return Path(output)


def page(
    papers: Sequence[str] | None = None, scale: str | None = None, runs: Path | None = None, stamp: str = ""
) -> str:
    """The report as HTML: promoted records, and beside them, as "yours", what is in a folder of runs.

    Args:
        papers: package or short names; None for all that exist.
        scale: keep one scale; None for all that were measured.
        runs: folder of runs.
        stamp: of a live page, which loads itself again when the server has another one.

    Raises:
        ReportingError: for an unknown paper or scale or a malformed promoted record.
    """
    folder = runs or runs_root()
    chosen = [paper_named(name) for name in papers] if papers else existing_papers()
    scales = [check_scale(scale)] if scale else list(SCALES)
    budget = Budget()
    sections = []
    for number, paper in enumerate(chosen):
        # What one paper leaves of its share goes to those after it.
        share = Budget(budget.left // (len(chosen) - number))
        before = share.left
        sections.append(_Section(paper, scales, folder, share).content())
        budget.left -= before - share.left
    newest = max((r.started for s in sections for r in s["records"]), default="")
    text: str = _template().render(
        sections=sections,
        verdicts=VERDICTS,
        marks=MARKS,
        promoted=sum(s["promoted"] for s in sections),
        fresh=sum(s["fresh"] for s in sections),
        newest=newest[:10],
        stamp=stamp,
    )
    return text


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("common.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


@dataclass(frozen=True)
class _ShownRun:
    """What the page shows of one run."""

    run: Run
    progress: str
    curves: dict[str, list[tuple[float, float]]]
    gallery: Gallery

    @property
    def label(self) -> str:
        return self.run.record.draw.label if self.run.record else self.run.folder.parent.name.removeprefix("seed")


class _Section:
    """What the page says about one paper."""

    def __init__(self, paper: Paper, scales: Sequence[str], folder: Path, budget: Budget) -> None:
        self.paper, self.scales, self.folder = paper, scales, folder
        self.source: Tables = load(paper.name)
        self.recorded = [r for r in find_promoted(paper.name) if r.scale in scales]
        self.facts = {id(r): self._facts(r, draw_file(paper, r.scale, r.draw)) for r in self.recorded}
        self.runs = self._readable(budget)
        self.fresh = [shown.run.record for shown in self.runs if shown.run.record]

    def _readable(self, budget: Budget) -> list[_ShownRun]:
        """The runs in the order of the stages. One that cannot be shown, whatever is wrong with it, is left out."""
        found = [run for run in find_runs(self.folder, [self.paper.name]) if run.state != DAMAGED]
        order = {stage: place for place, stage in enumerate(self.source.stages)}

        def place(run: Run) -> tuple[int, int, str]:
            scale, stage = run.name.split("/")[1], run.folder.name
            return SCALES.index(scale), order.get(stage.partition("@")[0], len(order)), stage

        ranks: Counter[tuple[int, int, str]] = Counter()
        ranked = []
        for run in found:
            ranked.append((ranks[place(run)], run))
            ranks[place(run)] += 1
        shown = []
        # Where the page cannot hold all pictures, it holds those of the first draw of every stage.
        for rank, run in sorted(ranked, key=lambda item: (item[0], place(item[1]))):
            if run.name.split("/")[1] in self.scales:
                try:
                    shown.append(self._shown(run, budget, rank))
                except Exception as error:
                    warn_of(f"{run.folder} is left out of the page: {type(error).__name__}: {error}")
        return sorted(shown, key=lambda one: place(one.run))

    def _shown(self, run: Run, budget: Budget, rank: int) -> _ShownRun:
        """Read everything that a run could have wrong."""
        if run.record:
            self.facts[id(run.record)] = self._facts(run.record, run.folder / RECORD_FILE)
        told = run.fields.get("progress", "") if run.record is None else ""
        pictures = gallery(run.folder, run.record, budget, rank == 0) if run.record else Gallery()
        return _ShownRun(run, told, read_curves(run.folder / "metrics.csv"), pictures)

    def _facts(self, record: Record, path: Path) -> dict[str, Any]:
        """Where the values of a record come from, as texts."""
        root = project_root()
        return {
            "file": (path.relative_to(root) if path.is_relative_to(root) else path).as_posix(),
            "hardware": render.hardware_text(record),
            "date": record.started[:10],
            "revision": render.revision_text(record),
            "data": [
                f"{name}: {d.get('samples', '?')} samples, {d.get('skipped', '?')} skipped"
                for name, d in sorted(record.data.items())
            ],
            "deviations": [short_name(d["field"]) for d in record.deviations],
        }

    def content(self) -> dict[str, Any]:
        """The section as plain data for the template."""
        filled = {
            scale: list(
                zip(
                    render.fill(self.source, scale, self.recorded),
                    render.fill(self.source, scale, self.fresh),
                    strict=True,
                )
            )
            for scale in self.scales
        }
        measured = {
            scale: [pair for pair in filled[scale] if any(f.result.measured for f in pair)] for scale in self.scales
        }
        best = next((scale for scale in self.scales if measured[scale]), None)
        shown = {pair[0].result.table.id for pairs in measured.values() for pair in pairs}
        waiting = []
        for table in self.source.tables:
            # At the scale whose claims are listed, where the table exists at it.
            order = sorted(self.scales, key=lambda scale: scale != best)
            there = [pair for scale in order for pair in filled[scale] if pair[0].result.table.id == table.id]
            waiting += there[:1] if table.id not in shown else []
        claims = [claim for pair in (filled[best] if best else ()) for claim in self._judged(*pair)[0]]
        used = [r for pairs in measured.values() for pair in pairs for f in pair for r in f.result.records]
        return {
            "name": self.paper.name,
            "title": self.paper.title,
            "short": self.paper.short,
            "best": best,
            "overview": render.overview_row(self.source, self.recorded or self.fresh),
            "claims": claims,
            "counts": {v: sum(c["verdict"] == v for c in claims) for v in VERDICTS},
            "scales": [
                {"name": scale, "tables": [self._table(*pair) for pair in measured[scale]]}
                for scale in self.scales
                if measured[scale]
            ],
            "waiting": [self._table(*pair) for pair in waiting],
            "deviations": _deviations(used),
            "ours": {
                scale: ours
                for scale in self.scales
                if (ours := render.ours_at(scale, [f for pair in measured[scale] for f in pair]))
            },
            "comparisons": comparisons(
                (r.run.record.scale, r.run.record.stage, r.gallery) for r in self.runs if r.run.record
            ),
            "runs": self._runs(),
            "running": [{"name": r.run.name, "progress": r.progress} for r in self.runs if r.run.state == RUNNING],
            "records": used,
            "promoted": len(self.recorded),
            "fresh": len(self.fresh),
        }

    def _judged(self, recorded: render.Filled, yours: render.Filled) -> list[list[dict[str, Any]]]:
        """The claims of a table and the checks, judged on the recorded runs, else on yours."""
        main = recorded if recorded.result.measured else yours
        found = []
        for judged, mine in zip((main.claims, main.checks), (yours.claims, yours.checks), strict=True):
            beside = mine if main is recorded and yours.result.measured else [None] * len(judged)
            found.append([self._judged_row(*pair) for pair in zip(judged, beside, strict=True)])
        return found

    def _judged_row(self, judged: Judged, yours: Judged | None) -> dict[str, Any]:
        return {
            "cells": render.judged_cells(judged),
            "predicate": judged.check.holds.text,
            "anchor": _anchor(self.paper, judged.table, judged.scale),
            "scale": judged.scale,
            "verdict": judged.verdict,
            "size": -1e9 if judged.difference is None else judged.difference,
            "yours": yours and {"verdict": yours.verdict, "label": yours.label, "margin": yours.outcome},
        }

    def _table(self, recorded: render.Filled, yours: render.Filled) -> dict[str, Any]:
        shown = render.view(recorded.result, yours.result)
        table, scale = recorded.result.table, shown.scale
        measured = recorded.result.measured or yours.result.measured
        main = recorded.result if recorded.result.measured else yours.result
        names = {render.MEASURED: f"{'recorded' if yours.result.measured else 'measured'} at {scale}"}
        names |= {render.YOURS: f"yours at {scale}"}
        return {
            "anchor": _anchor(self.paper, table.id, scale),
            "title": shown.title,
            "scale": scale,
            "measured": measured,
            "caption": ("" if measured else "Not measured yet. ") + shown.caption.replace("*", ""),
            "groups": [
                {
                    "label": m.title,
                    "down": m.better == "down",
                    "columns": [(kind, names.get(kind, kind)) for kind in shown.kinds[m.id]],
                }
                for m in shown.metrics
            ],
            "rows": [
                {
                    "label": render.row_text(row),
                    "cells": [
                        {
                            "kind": value.kind,
                            "text": value.text,
                            "source": row.source,
                            "provenance": self._provenance(f"{row.label}, {metric.label}", value.cell)
                            if value.kind != render.PUBLISHED and value.cell.records
                            else None,
                        }
                        for metric, values in zip(shown.metrics, cells, strict=True)
                        for value in values
                    ],
                }
                for row, cells in shown.rows
            ],
            "curve": charts.curve(main),
            "dots": charts.dots(main, yours.result if main is recorded.result else None),
            "open": table.chart or (not table.curve and scale != "smoke"),
            "notes": shown.notes,
            "deviations": list(dict.fromkeys(d for r in main.records for d in self.facts[id(r)]["deviations"])),
            "judged": [judged for judged in self._judged(recorded, yours) if judged],
            "yours": main is recorded.result and yours.result.measured,
            "provenance": shown.provenance,
        }

    def _provenance(self, what: str, cell: Cell) -> dict[str, Any]:
        """Where one measured cell comes from."""
        stages: dict[str, list[Record]] = {}
        for record in cell.records:
            stages.setdefault(record.stage, []).append(record)
        facts = [self.facts[id(record)] for record in cell.records]
        return {
            "what": what,
            "scale": cell.records[0].scale,
            "values": [f"{draw}: {value:.5g}" for draw, value in sorted(cell.values.items())],
            "stages": [
                {
                    "name": stage,
                    "configuration": group[0].configuration,
                    "files": self._files(group),
                    "duration": _duration(group),
                }
                for stage, group in stages.items()
            ],
            "hardware": sorted({f["hardware"] for f in facts}),
            "dates": sorted({f["date"] for f in facts}),
            "revisions": sorted({f["revision"] for f in facts}),
            "data": list(dict.fromkeys(line for f in facts for line in f["data"])),
            "deviations": sorted({name for f in facts for name in f["deviations"]}),
        }

    def _files(self, records: Sequence[Record]) -> str:
        """The records' files; those that differ by their draw alone as one pattern that a shell takes."""
        draws: dict[str, set[str]] = {}
        for record in records:
            number = record.draw.folder.removeprefix("seed")
            text = re.sub(rf"/seed{number}(?=[/.])", "/seed{}", self.facts[id(record)]["file"])
            draws.setdefault(text, set()).add(number)
        return " ".join(
            text.replace("{}", found.pop() if len(found) == 1 else "{" + ",".join(sorted(found)) + "}")
            for text, found in draws.items()
        )

    def _runs(self) -> list[dict[str, Any]]:
        """Curves, pictures and clips per scale and stage, the draws together."""
        grouped: dict[tuple[str, str], list[_ShownRun]] = {}
        for shown in self.runs:
            grouped.setdefault((shown.run.name.split("/")[1], shown.run.folder.name), []).append(shown)
        recorded = promoted_curves(self.paper) if self.runs else {}
        sections: list[dict[str, Any]] = []
        for (scale, stage), group in grouped.items():
            records = [shown.run.record for shown in group if shown.run.record]
            lines: dict[str, dict[str, charts.Points]] = {}
            for shown in group:
                for metric, points in shown.curves.items():
                    lines.setdefault(metric, {f"seed {one.label}": () for one in group})[f"seed {shown.label}"] = points
            draws = [place_of(r) for r in self.recorded if (r.scale, r.stage) == (scale, stage)] if lines else []
            band = band_of(recorded.get(draw, {}) for draw in draws)
            sections.append(
                {
                    "stage": stage,
                    "scale": scale,
                    "seeds": [shown.label for shown in group],
                    "states": [f"seed {one.label}: {one.run.state} {one.progress}"
                               for one in group if not one.run.record],
                    "duration": _duration(records),
                    "provenance": render.provenance(records),
                    "curves": [
                        charts.training(name, lines[name], band.get(name, ()))
                        for name in sorted(lines, key=importance)
                    ],
                    "recorded": len(draws) if band else 0,
                    "galleries": {shown.label: shown.gallery for shown in group},
                    "holds": _holds(len(lines), [shown.gallery for shown in group]),
                }
            )  # fmt: skip
        # One that has pictures stands open, to show what there is.
        first = [s for s in sections if any(g.media for g in s["galleries"].values())] or sections
        for section in sections:
            section["open"] = section is first[0] or bool(section["states"])
        return sections


def _duration(records: Sequence[Record]) -> str:
    seconds = sum(r.wall_seconds for r in records)
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _holds(curves: int, galleries: Sequence[Gallery]) -> str:
    """What a run has to show, in words; empty when it has nothing."""
    kinds = [m.kind for g in galleries for m in g.media]
    counts = {
        "curve": curves,
        "picture": kinds.count("image"),
        "clip": kinds.count("video"),
        "table": sum(len(g.sheets) for g in galleries),
    }
    return ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count)


def _anchor(paper: Paper, table: str, scale: str) -> str:
    return f"{paper.short}-{table}-{scale}".replace("_", "-")


def _deviations(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What the records state beyond sizes, a list for each scale; each reason once, with the fields it is given for."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for record in records:
        for d in record.deviations:
            found.setdefault(record.scale, {})[d["field"], d["reason"]] = None
    return [
        {"scale": scale, "entries": [{"field": f, "reason": r} for f, r in sorted(found[scale])]}
        for scale in SCALES
        if scale in found
    ]
