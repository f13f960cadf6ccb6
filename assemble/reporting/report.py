"""Render one self-contained page that works offline: verdicts, claims, tables, curves, media and provenance."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from assemble.reporting import charts, code, compare, media, render
from assemble.reporting.aggregate import Cell, select
from assemble.reporting.claims import AGREES, DIFFERS, FAILS, HOLDS, NOT_RUN, NOT_SEPARABLE
from assemble.reporting.curves import Curves, band_of, importance, read_points, thinned
from assemble.reporting.media import Budget, Gallery, Medium, gallery
from assemble.reporting.papers import SCALES, Paper, paper_named, project_root
from assemble.reporting.progress import duration
from assemble.reporting.records import GIVEN, RECORD_FILE, Record, short_name, warn_of
from assemble.reporting.results import draw_file, find_promoted, place_of, promoted_curves
from assemble.reporting.runs import RUNNING, Run, find_runs
from assemble.reporting.tables import Metric, Row, Tables, load
from common.errors import printable

#: Largest number of curves drawn for a stage. Our stages have at most 40.
MAX_CURVES = 200
MARKS = {HOLDS: "✓", FAILS: "✗", NOT_SEPARABLE: "≈", AGREES: "=", DIFFERS: "≠", NOT_RUN: "–"}


def page(papers: Sequence[str], scale: str | None, runs: Path, stamp: str = "") -> str:
    """Render the report as HTML, with local runs as "yours". A live page reloads when its `stamp` changes."""
    scales = [scale] if scale else list(SCALES)
    sections = [
        _Section(paper_named(name), scales, runs, Budget(media.MAX_PAGE_BYTES // len(papers))) for name in papers
    ]
    newest = max((r.started for s in sections for r in (*s.recorded, *s.fresh)), default="")
    environment = Environment(
        loader=PackageLoader("assemble.reporting", "templates"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        sections=sections,
        marks=MARKS,
        strips=charts.strips,
        tally=render.tally,
        judged_cells=render.judged_cells,
        row_text=render.row_text,
        newest=newest[:10],
        stamp=stamp,
    )


@dataclass(frozen=True)
class _ShownRun:
    run: Run
    curves: Curves
    gallery: Gallery

    @property
    def label(self) -> str:
        return self.run.record.draw.label if self.run.record else self.run.folder.parent.name.removeprefix("seed")


class _Table:
    """A table of the page. If no results are recorded, show the user's runs as the main numbers."""

    def __init__(self, recorded: render.Filled, yours: render.Filled) -> None:
        self.recorded, self.yours = recorded, yours
        main = recorded if recorded.result.measured else yours
        self.measured = main.result.measured
        self.has_both = main is recorded and yours.result.measured
        self.table, self.scale = recorded.result.table, recorded.result.scale
        self.given = recorded.result.given
        self.id = f"{self.table.id}{GIVEN if self.given else ''}"
        self.names = {
            render.PUBLISHED: "published",
            render.DIFFERENCE: "difference",
            render.MEASURED: f"{'recorded' if self.has_both else 'measured'} at {self.scale}",
            render.YOURS: f"yours at {self.scale}",
        }
        self.claims, self.checks = (
            list(zip(ours, theirs if self.has_both else [None] * len(ours)))
            for ours, theirs in ((main.claims, yours.claims), (main.checks, yours.checks))
        )
        self.view = render.view(recorded.result, yours.result)
        self.curve = charts.curve(main.result)
        self.dots = charts.dots(main.result, yours.result if self.has_both else None)


class _Section:
    """A paper's part of the page, for the template; `tables` maps measured scales to tables.

    Claims are judged at `best`, the largest measured scale, on the recorded runs and on yours, if any.
    """

    def __init__(self, paper: Paper, scales: Sequence[str], folder: Path, budget: Budget) -> None:
        self.paper, self.scales, self.folder = paper, scales, folder
        self.source: Tables = load(paper.name)
        self.recorded = [r for r in find_promoted(paper.name) if r.scale in scales]
        self.current = [r for scale in scales for r in select(self.recorded, paper.name, scale).kept.values()]
        self.files = {id(r): _from_here(draw_file(paper, r)) for r in self.recorded}
        self._shown_runs = self._readable(budget)
        self.fresh = [shown.run.record for shown in self._shown_runs if shown.run.record]
        filled = [
            _Table(*pair)
            for given in (False, True)
            for scale in scales
            for pair in zip(
                *(render.fill(self.source, scale, records, given=given) for records in (self.recorded, self.fresh))
            )
        ]
        measured = [table for table in filled if table.measured]
        # Verdicts on given weights are shown only at their tables, unless there are no other verdicts.
        first = [table for table in measured if not table.given] or measured
        self.best = next((scale for scale in scales if any(t.scale == scale for t in first)), None)
        filled = [table for table in filled if table in first or not (table.measured or table.given)]
        self.tables = {scale: some for scale in scales if (some := [t for t in measured if t.scale == scale])}
        # Show unmeasured tables at the scale whose claims are listed, if they exist there.
        filled.sort(key=lambda table: table.scale != self.best)
        by_id = {table.id: table for table in reversed(filled)}
        self.waiting = [
            by_id[t.id] for t in self.source.tables if t.id in by_id and t.id not in {m.id for m in measured}
        ]
        self.claims = [pair for table in filled if table.scale == self.best for pair in table.claims]
        order = render.prominent(ours for ours, _ in self.claims)
        compared = []
        if self.best:
            mine = [r for r in self.fresh if r.scale == self.best]
            compared = compare.compare(
                self.source, self.best, mine, compare.others_recorded(paper.name, self.best, mine)
            )
        self.match = compare.summary(compared) if compared else "no runs" + f" at {self.best}" * bool(self.best)
        self.headline = sorted((p for p in self.claims if p[0] in order), key=lambda p: order.index(p[0]))
        self.first = next((table for table in filled if table.measured and table.claims), None)
        self.remarks = render.remarks([f for table in measured for f in (table.recorded, table.yours)])
        # Rows of pictures with the same columns, by (scale, title, columns).
        self.comparisons: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, Medium]]] = {}
        for shown in self._shown_runs:
            for title, (columns, row) in shown.gallery.rows.items():
                key = shown.run.fields["scale"], title, columns
                self.comparisons.setdefault(key, []).append((shown.run.fields["stage"], row))
        self.other_code = code.other_code(self.fresh)
        self.running = [shown for shown in self._shown_runs if shown.run.state == RUNNING]
        self.runs = self._runs()

    def _readable(self, budget: Budget) -> list[_ShownRun]:
        """Return the runs that can be rendered, in stage order."""
        order = {stage: place for place, stage in enumerate(self.source.stages)}
        of_stage: dict[tuple[int, int, str], list[Run]] = {}
        for run in find_runs(self.folder, [self.paper.name]):
            scale, stage = run.fields["scale"], run.fields["stage"]
            if scale in self.scales:
                place = (SCALES.index(scale), order.get(stage.partition("@")[0], len(order)), stage)
                of_stage.setdefault(place, []).append(run)
        ranked = [(rank, place, run) for place, runs in of_stage.items() for rank, run in enumerate(runs)]
        shown = []
        # If not all pictures fit, show those of the first draw of every stage.
        for rank, place, run in sorted(ranked, key=itemgetter(0, 1)):
            try:
                shown.append((place, self._shown(run, budget, rank)))
            except Exception as error:
                warn_of(f"the page omits {run.folder}: {type(error).__name__}: {error}")
        return [row for _, row in sorted(shown, key=itemgetter(0))]

    def _shown(self, run: Run, budget: Budget, rank: int) -> _ShownRun:
        """Read everything in a run that could be malformed."""
        if run.record:
            self.files[id(run.record)] = _from_here(run.folder / RECORD_FILE)
        pictures = gallery(run.folder, run.record, budget, rank == 0) if run.record else Gallery()
        return _ShownRun(run, thinned(read_points(run.folder / "metrics.csv")), pictures)

    def origin(self, cell: Cell) -> dict[str, Any]:
        """Say where the value of a cell comes from."""
        records = cell.records
        stages: dict[str, list[Record]] = {}
        for record in records:
            stages.setdefault(record.stage, []).append(record)
        data = [
            f"{name}: {d.get('samples', '?')} samples, {d.get('skipped', '?')} skipped"
            for record in records
            for name, d in sorted(record.data.items())
        ]
        return {
            "values": [f"{draw}: {value:.5g}" for draw, value in sorted(cell.values.items())],
            "stages": [
                (stage, group[0].configuration, duration(sum(r.wall_seconds for r in group)))
                for stage, group in stages.items()
            ],
            "files": sorted({self.files[id(record)] for record in records}),
            "hardware": sorted({record.machine for record in records}),
            "dates": sorted({record.started[:10] for record in records}),
            "revisions": sorted({record.revision for record in records}),
            "data": list(dict.fromkeys(data)),
            "deviations": sorted({short_name(d["field"]) for record in records for d in record.deviations}),
        }

    def explain(self, table: _Table, row: Row, metric: Metric, kind: str) -> str:
        """Return the command that explains a cell."""
        words = ["assemble", "explain", self.paper.short, table.id, row.label, metric.id, "--scale", table.scale]
        return shlex.join([*words, *(["--run", _from_here(self.folder)] if kind == render.YOURS else [])])

    def _runs(self) -> list[dict[str, Any]]:
        """Return curves, pictures and clips per scale and stage. All draws of a stage share one entry."""
        grouped: dict[tuple[str, str], list[_ShownRun]] = {}
        for shown in self._shown_runs:
            grouped.setdefault((shown.run.fields["scale"], shown.run.fields["stage"]), []).append(shown)
        recorded = promoted_curves(self.paper) if self._shown_runs else {}
        sections: list[dict[str, Any]] = []
        for (scale, stage), group in grouped.items():
            records = [shown.run.record for shown in group if shown.run.record]
            lines: dict[str, dict[str, charts.Points]] = {}
            for shown in group:
                for metric, points in shown.curves.items():
                    lines.setdefault(metric, {f"seed {run.label}": () for run in group})[f"seed {shown.label}"] = points
            draws = [place_of(r) for r in self.current if (r.scale, r.stage) == (scale, stage)] if lines else []
            if len(lines) > MAX_CURVES:
                warn_of(f"the page omits {len(lines) - MAX_CURVES} of the {len(lines)} curves of {stage}")
            band = band_of(recorded.get(draw, {}) for draw in draws)
            sections.append(
                {
                    "stage": stage,
                    "scale": scale,
                    "seeds": [shown.label for shown in group],
                    "states": [f"seed {run.label}: {run.run.state} {run.run.fields.get('progress', '')}"
                               for run in group if not run.run.record],
                    "duration": duration(sum(r.wall_seconds for r in records)),
                    "provenance": render.provenance(records),
                    "curves": [
                        charts.training(name, lines[name], band.get(name, ()))
                        for name in sorted(lines, key=importance)[:MAX_CURVES]
                    ],
                    "recorded": len(draws) if band else 0,
                    "galleries": {shown.label: shown.gallery for shown in group},
                }
            )  # fmt: skip
        # Expand a run that has pictures.
        first = [s for s in sections if any(g.media for g in s["galleries"].values())] or sections
        for section in sections:
            section["open"] = section is first[0] or bool(section["states"])
        return sections


def _from_here(path: Path) -> str:
    root = project_root()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
