"""One self-contained page: claims, tables, charts, training curves, pictures, clips, provenance.

It needs no network. What its script adds (filters, provenance on hover) can be had without it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.reporting import charts, figures, render
from common.reporting.aggregate import Cell, TableResult
from common.reporting.claims import FAILS, HOLDS, NOT_RUN, NOT_SEPARABLE, VERDICTS, ClaimResult
from common.reporting.curves import band_of, importance, read_curves
from common.reporting.media import Budget, Gallery, comparisons, gallery
from common.reporting.papers import (
    SCALES,
    Paper,
    check_scale,
    existing_papers,
    paper_named,
    project_root,
    runs_root,
)
from common.reporting.promote import as_kept, machines
from common.reporting.records import (
    RECORD_FILE,
    Record,
    find,
    find_promoted,
    promoted_curves,
    promoted_file,
    short_name,
    warn,
)
from common.reporting.tables import Row, Tables, load

MARKS = {HOLDS: "✓", FAILS: "✗", NOT_SEPARABLE: "≈", NOT_RUN: "–"}
MOST_OPEN_CHARTS = 6
"""A table with more charts than this shows them on demand, unless its `chart: true` asks for them."""


def build(
    output: Path, papers: Sequence[str] | None = None, scale: str | None = None, runs: Path | None = None
) -> Path:
    """Write the report page.

    Tables come from the promoted records together with the fresh ones of `runs` (of two records of one stage
    and seed the newer counts); curves, pictures and clips from the folders of the runs.

    Args:
        output: the HTML file.
        papers: package or short names; None for all that exist.
        scale: keep one scale; None for all that were measured.
        runs: folder of runs.

    Returns:
        The file.

    Raises:
        ReportingError: for an unknown paper or scale or a malformed record.
        AtomicWriteError: when the page cannot be written.
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
        sections.append(_Section(paper, scales, folder).content(share))
        budget.left -= before - share.left
    newest = max((r.started for s in sections for r in s["records"]), default="")
    text = _template().render(
        sections=sections,
        verdicts=VERDICTS,
        marks=MARKS,
        promoted=sum(s["promoted"] for s in sections),
        fresh=sum(s["fresh"] for s in sections),
        newest=newest[:10],
    )
    write_atomically(Path(output), text)
    return Path(output)


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


class _Section:
    """What the page says about one paper."""

    def __init__(self, paper: Paper, scales: Sequence[str], runs: Path) -> None:
        self.paper, self.scales, self.runs = paper, scales, runs
        self.source: Tables = load(paper.name)
        self.fresh = [r for r in (find(runs, paper.name, malformed=warn) if runs.is_dir() else []) if r.scale in scales]
        promoted = [r for r in find_promoted(paper.name) if r.scale in scales]
        self.promoted: dict[tuple[str, str], list[Record]] = {}
        for record in promoted:
            self.promoted.setdefault((record.scale, record.stage), []).append(record)
        # A seed on another kind of machine is another draw here as in what is promoted.
        kinds = machines(promoted)
        kept = {id(r): as_kept(r, kinds) for r in self.fresh}
        self.records = [*promoted, *kept.values()]
        self.files = {id(r): promoted_file(paper, r.scale, r.draw, r.stage) for r in promoted}
        for r in self.fresh:
            file = r.folder(runs) / RECORD_FILE
            self.files |= {id(r): file, id(kept[id(r)]): file}

    def content(self, budget: Budget) -> dict[str, Any]:
        """The section as plain data for the template."""
        filled = {scale: render.fill(self.source, scale, self.records) for scale in self.scales}
        measured = {scale: [f for f in filled[scale] if f.result.measured] for scale in self.scales}
        best = next((scale for scale in self.scales if measured[scale]), None)
        shown = {f.result.table.id for fs in measured.values() for f in fs}
        waiting = []
        for table in self.source.tables:
            # At the scale whose claims are listed, where the table exists at it.
            order = sorted(self.scales, key=lambda scale: scale != best)
            there = [f for scale in order for f in filled[scale] if f.result.table.id == table.id]
            waiting += there[:1] if table.id not in shown else []
        claims = [claim for f in (filled[best] if best else ()) for claim in f.claims]
        used = [r for fs in measured.values() for f in fs for r in f.result.records]
        return {
            "name": self.paper.name,
            "title": self.paper.title,
            "short": self.paper.short,
            "best": best,
            "overview": render.overview_row(self.paper, self.source, self.records),
            "claims": [self._claim(claim) for claim in claims],
            "counts": (counts := {v: sum(c.verdict == v for c in claims) for v in VERDICTS}),
            "verdict_chart": charts.svg_verdicts(counts),
            "scales": [
                {"name": scale, "tables": [self._table(f) for f in measured[scale]]}
                for scale in self.scales
                if measured[scale]
            ],
            "waiting": [self._table(f) for f in waiting],
            "deviations": _deviations(used),
            "ours": {scale: ours for scale in self.scales if (ours := render.ours_at(scale, measured[scale]))},
            "comparisons": comparisons(self.fresh, self.runs, list(self.source.stages), budget),
            "runs": self._runs(budget),
            "records": used,
            "promoted": len(self.records) - len(self.fresh),
            "fresh": len(self.fresh),
        }

    def _claim(self, claim: ClaimResult) -> dict[str, Any]:
        return {
            "text": claim.claim.text,
            "predicate": claim.claim.holds.text,
            "table": self.source.table(claim.table).title,
            "anchor": _anchor(self.paper, claim.table, claim.scale),
            "scale": claim.scale,
            "gate": claim.claim.gate == "mini",
            "verdict": claim.verdict,
            "label": claim.label,
            "margin": claim.outcome,
            "size": _size(claim),
        }

    def _table(self, filled: render.Filled) -> dict[str, Any]:
        result = filled.result
        table = result.table
        drawn = charts.svg_bars(result)
        metrics = [m for m in table.metrics if not m.hidden]
        columns = render.columns(result)
        return {
            "anchor": _anchor(self.paper, table.id, result.scale),
            "id": table.id,
            "title": table.title,
            "scale": result.scale,
            "measured": result.measured,
            "caption": ("" if result.measured else "Not measured yet. ") + render.caption(result).replace("*", ""),
            "groups": [
                {
                    "label": m.title,
                    "down": m.better == "down",
                    "columns": ["published" if c.published else "measured" for c in columns if c.metric.id == m.id],
                }
                for m in metrics
            ],
            "rows": [
                {"label": render.row_text(row), "cells": [self._cell(result, row, c) for c in columns]}
                for row in result.rows
            ],
            "figure": figures.curve(result),
            "figure_label": f"{table.curve.y} against {table.curve.x}" if table.curve else "",
            "charts": drawn,
            "charts_open": table.chart or (len(drawn) <= MOST_OPEN_CHARTS and result.scale != "smoke"),
            "notes": render.notes_of(result),
            "deviations": [short_name(d["field"]) for d in result.deviations],
            "claims": [self._claim(claim) for claim in filled.claims],
            "provenance": render.provenance(result.records),
        }

    def _cell(self, result: TableResult, row: Row, column: render.Column) -> dict[str, Any]:
        cell = result.cells[row.label, column.metric.id]
        text = render.cell_text(result, row, column)
        if column.published:
            return {"kind": "published", "text": text, "source": row.source}
        what = f"{row.label}, {column.metric.label}"
        return {"kind": "measured", "text": text, "provenance": self._provenance(what, cell) if cell.records else None}

    def _provenance(self, what: str, cell: Cell) -> dict[str, Any]:
        """Where one measured cell comes from."""
        records = cell.records
        stages: dict[str, list[Record]] = {}
        for record in records:
            stages.setdefault(record.stage, []).append(record)
        data = {
            f"{name}: {d.get('samples', '?')} samples, {d.get('skipped', '?')} skipped": None
            for record in records
            for name, d in sorted(record.data.items())
        }
        return {
            "what": what,
            "scale": records[0].scale,
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
            "hardware": sorted({render.hardware_text(r) for r in records}),
            "dates": sorted({r.started[:10] for r in records}),
            "revisions": sorted({render.revision_text(r) for r in records}),
            "data": list(data),
            "deviations": sorted({short_name(d["field"]) for r in records for d in r.deviations}),
        }

    def _files(self, records: Sequence[Record]) -> str:
        """The records' files; those that differ by their draw alone as one pattern that a shell takes."""
        draws: dict[str, list[str]] = {}
        for record in records:
            path, root = self.files[id(record)], project_root()
            text = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
            number = record.draw.folder.removeprefix("seed")
            draws.setdefault(text.replace(f"/seed{number}/", "/seed{}/"), []).append(number)
        return " ".join(
            text.replace("{}", found[0] if len(found) == 1 else "{" + ",".join(sorted(found)) + "}")
            for text, found in draws.items()
        )

    def _runs(self, budget: Budget) -> list[dict[str, Any]]:
        """Curves, pictures and clips per scale and stage, the draws together."""
        order = {stage: place for place, stage in enumerate(self.source.stages)}
        grouped: dict[tuple[str, str], list[Record]] = {}
        for record in sorted(self.fresh, key=lambda r: r.draw):
            grouped.setdefault((record.scale, record.stage), []).append(record)
        places = sorted(
            grouped, key=lambda k: (SCALES.index(k[0]), order.get(k[1].partition("@")[0], len(order)), k[1])
        )
        galleries: dict[tuple[str, str], dict[str, Gallery]] = {key: {} for key in places}
        # Where the page cannot hold all, it holds the first draw of every stage.
        for rank in range(max((len(group) for group in grouped.values()), default=0)):
            for key in places:
                for record in grouped[key][rank : rank + 1]:
                    galleries[key][record.draw.label] = gallery(self._folder(record), record, budget)
        sections: list[dict[str, Any]] = []
        for scale, stage in places:
            group = grouped[scale, stage]
            lines: dict[str, dict[str, charts.Points]] = {}
            for record in group:
                for metric, points in read_curves(self._folder(record) / "metrics.csv").items():
                    lines.setdefault(metric, {str(r.draw): () for r in group})[str(record.draw)] = points
            recorded = self._recorded(scale, stage) if lines else {}
            sections.append(
                {
                    "stage": stage,
                    "scale": scale,
                    "seeds": [r.draw.label for r in group],
                    "duration": _duration(group),
                    "provenance": render.provenance(group),
                    "curves": [
                        charts.svg_lines(name, lines[name], band=recorded.get(name, ()))
                        for name in sorted(lines, key=importance)
                    ],
                    "recorded": len(self.promoted.get((scale, stage), ())) if recorded else 0,
                    "galleries": galleries[scale, stage],
                    "holds": _holds(len(lines), list(galleries[scale, stage].values())),
                }
            )
        # One that has pictures stands open, to show what there is.
        shown = [s for s in sections if any(g.media for g in s["galleries"].values())] or sections
        for section in sections:
            section["open"] = section is shown[0]
        return sections

    def _recorded(self, scale: str, stage: str) -> dict[str, list[tuple[float, float, float]]]:
        """Per curve, the least and the greatest value of the promoted draws at every step."""
        draws = [record.draw for record in self.promoted.get((scale, stage), ())]
        return band_of(promoted_curves(promoted_file(self.paper, scale, draw, stage)) for draw in draws)

    def _folder(self, record: Record) -> Path:
        return record.folder(self.runs)


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


def _size(claim: ClaimResult) -> float:
    """The margin in half widths of its interval, to sort by: huge without a width, lowest without a margin."""
    if claim.margin is None:
        return -1e9
    low, high = claim.interval or (0.0, 0.0)
    return claim.margin / ((high - low) / 2) if high > low else 1e6 * claim.margin


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
