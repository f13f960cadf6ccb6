"""One self-contained page: claims, tables, training curves, pictures, provenance. It needs no network and no script."""

from __future__ import annotations

import base64
import csv
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.reporting import render
from common.reporting.aggregate import TableResult
from common.reporting.atomic import write_text_atomically
from common.reporting.papers import SCALES, check_scale, existing_papers, paper_named, runs_root
from common.reporting.records import Record, find, find_promoted, run_folder
from common.reporting.tables import load

COLOURS = ("#3266ad", "#c2571a", "#2f8f5b", "#8a4fae", "#a8842c", "#4a4a4a")
MAX_POINTS = 300
MAX_IMAGE_BYTES = 2_000_000
MAX_IMAGES_PER_RUN = 24
_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}


@dataclass
class Curve:
    """One metric of one stage over training, a line per seed."""

    title: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def svg(self) -> str:
        """The curve as inline SVG."""
        return svg_chart(self)


@dataclass(frozen=True)
class Picture:
    """An embedded picture."""

    name: str
    uri: str


@dataclass
class Comparison:
    """Rows of pictures of several stages that show the same things in the same order, one row a stage."""

    title: str
    scale: str
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[str, Picture]] = field(default_factory=list)


def build(
    output: Path, papers: Sequence[str] | None = None, scale: str | None = None, runs: Path | None = None
) -> Path:
    """Write the report page.

    Tables come from the promoted records together with the fresh ones of ``runs`` (of two records of one stage
    and seed the newer counts); curves and pictures from the folders of the runs.

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
    sections = [_paper_section(paper.name, paper.title, scales, folder) for paper in chosen]
    text = _template().render(sections=sections, scales=scales)
    write_text_atomically(Path(output), text)
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


def _paper_section(name: str, title: str, scales: list[str], runs: Path) -> dict[str, Any]:
    source = load(name)
    fresh = find(runs, name) if runs.is_dir() else []
    records = [*find_promoted(name), *fresh]
    filled = [f for scale in scales for f in render.fill(source, scale, records) if f.result.measured]
    if not filled:
        filled = render.fill(source, scales[0], [])
    shown = {(r.scale, r.stage) for f in filled for r in f.result.records}
    stages = [r for r in fresh if r.scale in scales]
    return {
        "name": name,
        "title": title,
        "tables": [_table(f) for f in filled],
        "claims": [c for f in filled for c in f.claims],
        "comparisons": _comparisons(stages, runs, list(source.stages)),
        "runs": _runs(stages, runs),
        "deviations": _deviations([r for r in records if (r.scale, r.stage) in shown]),
    }


def _table(filled: render.Filled) -> dict[str, Any]:
    result = filled.result
    shown = render.columns(result)
    rows = []
    for row in result.rows:
        cells = []
        for column in shown:
            cell = result.cells[row.label, column.metric.id]
            hover = (row.source or result.table.source) if column.published else render.cell_provenance(cell)
            text = render.cell_text(result, row, column)
            cells.append(
                {
                    "text": text,
                    "title": hover if text != render.DASH else "",
                    "kind": "published" if column.published else "measured",
                }
            )
        rows.append({"label": render.row_text(row), "cells": cells})
    return {
        "title": result.table.title,
        "scale": result.scale,
        "caption": render.caption(result).replace("**", ""),
        "headings": [column.heading for column in shown],
        "rows": rows,
        "chart": svg_bars(result) if result.table.chart else "",
        "notes": render.notes_of(result),
        "provenance": render.provenance(result.records),
    }


def _deviations(records: Sequence[Record]) -> list[dict[str, str]]:
    unique = {(r.scale, d["field"], d["reason"]) for r in records for d in r.deviations}
    return [{"scale": s, "field": f, "reason": reason} for s, f, reason in sorted(unique)]


def _runs(records: Sequence[Record], runs: Path) -> list[dict[str, Any]]:
    """Curves and pictures per stage and scale, the seeds together."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        grouped.setdefault((record.scale, record.stage), []).append(record)
    sections = []
    for (scale, stage), group in sorted(grouped.items(), key=lambda item: (SCALES.index(item[0][0]), item[0][1])):
        curves: dict[str, Curve] = {}
        pictures: list[Picture] = []
        left_out = 0
        for record in group:
            folder = run_folder(runs, record.paper, record.scale, record.seed, record.stage)
            for metric, points in read_curves(folder / "metrics.csv").items():
                curve = curves.setdefault(metric, Curve(metric))
                curve.lines[f"seed {record.seed}"] = points
            found, more = read_pictures(folder, record)
            pictures += found
            left_out += more
        sections.append(
            {
                "stage": stage,
                "scale": scale,
                "minutes": sum(r.wall_seconds for r in group) / 60,
                "provenance": render.provenance(group),
                "curves": [curves[name] for name in sorted(curves)],
                "pictures": pictures,
                "pictures_left_out": left_out,
            }
        )
    return sections


def _comparisons(records: Sequence[Record], runs: Path, order: Sequence[str]) -> list[Comparison]:
    """Pictures named `<title>.row.png` of all stages below each other, in the order of the paper's stages.

    A file `<title>.row.json` beside them says what is shown, from left to right. Only stages that show the same are put
    together; of a stage with several seeds the first.
    """
    found: dict[tuple[str, str, str], Comparison] = {}
    known = {stage: place for place, stage in enumerate(order)}
    for record in sorted(records, key=lambda r: (known.get(r.stage.partition("@")[0], len(known)), r.stage, r.seed)):
        folder = run_folder(runs, record.paper, record.scale, record.seed, record.stage)
        for name in record.media:
            path = folder / name
            if not name.endswith(".row.png") or not path.is_file() or path.stat().st_size > MAX_IMAGE_BYTES:
                continue
            beside = path.with_suffix(".json")
            text = beside.read_text(encoding="utf-8") if beside.is_file() else "[]"
            title = path.name.removesuffix(".row.png")
            comparison = found.setdefault(
                (record.scale, title, text), Comparison(title, record.scale, json.loads(text))
            )
            if record.stage not in [stage for stage, _ in comparison.rows]:
                comparison.rows.append((record.stage, Picture(f"{record.stage}, seed {record.seed}", _embedded(path))))
    return [comparison for comparison in found.values() if len(comparison.rows) > 1]


def _embedded(path: Path) -> str:
    return f"data:{_IMAGE_TYPES[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read a run's ``metrics.csv``.

    Args:
        path: file with the columns ``step``, ``name`` and ``value``; or with a column for each metric, a row of which
            holds the values logged at one time, the rest of it being empty.

    Returns:
        Metric to (step, value) points, sorted by step, thinned to at most ``MAX_POINTS``. Metrics with fewer than
        two finite points are left out; so is a file that does not exist.
    """
    if not path.is_file():
        return {}
    found: dict[str, list[tuple[float, float]]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            if step is None:
                continue
            entries = {row["name"]: row["value"]} if row.keys() == {"step", "name", "value"} else row
            for name, text in entries.items():
                value = _number(text) if isinstance(text, str) else None
                if name and name not in ("step", "epoch") and value is not None:
                    found.setdefault(name, []).append((step, value))
    return {name: _thinned(sorted(points)) for name, points in found.items() if len(points) > 1}


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of equal groups of neighbouring points, so that no peak of noise is picked by chance."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def read_pictures(folder: Path, record: Record) -> tuple[list[Picture], int]:
    """The pictures of a run, embedded; and how many were left out for their size, type or number."""
    pictures: list[Picture] = []
    left_out = 0
    for name in record.media:
        path = next((p for p in (folder / name, folder / "media" / name) if p.is_file()), None)
        kind = _IMAGE_TYPES.get(Path(name).suffix.lower())
        if path is None or kind is None or path.stat().st_size > MAX_IMAGE_BYTES or len(pictures) == MAX_IMAGES_PER_RUN:
            left_out += 1
            continue
        pictures.append(Picture(f"seed {record.seed}: {Path(name).name}", _embedded(path)))
    return pictures, left_out


def svg_bars(result: TableResult, height: int = 220) -> str:
    """Measured cells of a table as inline SVG: a group of bars for each metric, a bar for each row, spreads as lines.

    Args:
        result: the filled table; its metrics should be of one unit.
        height: of the drawing; its width follows from the number of bars.

    Returns:
        The drawing with a legend; empty when nothing was measured.
    """
    metrics = [metric for metric in result.table.metrics if not metric.hidden]
    rows = [row for row in result.rows if any(result.cells[row.label, m.id].mean is not None for m in metrics)]
    tops = [
        cell.mean + (cell.spread or 0.0)
        for row in rows
        for cell in (result.cells[row.label, metric.id] for metric in metrics)
        if cell.mean is not None
    ]
    if not tops:
        return ""
    highest = max(*tops, 1e-9)
    bar, left, top, bottom = 9, 44, 8, 18 + 14 * len(rows)
    group = bar * (len(rows) + 1)
    width, inner = left + group * len(metrics), height - top - 18
    parts = [
        f'<svg viewBox="0 0 {width} {height + bottom - 18}" role="img" style="max-width: {2 * width}px">',
        f"<title>{html.escape(result.table.title)}</title>",
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end">{highest:.4g}</text>',
        f'<text x="{left - 4}" y="{top + inner}" text-anchor="end">0</text>',
    ]
    for i, metric in enumerate(metrics):
        start = left + i * group
        label = html.escape(metric.label)
        parts.append(f'<text x="{start}" y="{top + inner + 12}">{label}</text>')
        for j, row in enumerate(rows):
            cell = result.cells[row.label, metric.id]
            if cell.mean is None:
                continue
            size = max(cell.mean, 0.0) / highest * inner
            x, y = start + j * bar, top + inner - size
            what = html.escape(f"{row.label}, {metric.label}: {render.measured_text(cell, metric.decimals)}")
            parts.append(
                f'<rect x="{x}" y="{y:.1f}" width="{bar - 1}" height="{size:.1f}" fill="{COLOURS[j % len(COLOURS)]}" '
                f'fill-opacity="{1.0 if j < len(COLOURS) else 0.5}"><title>{what}</title></rect>'
            )
            if cell.spread is not None:
                half, middle = cell.spread / highest * inner, x + (bar - 1) / 2
                parts.append(
                    f'<line x1="{middle}" x2="{middle}" y1="{y - half:.1f}" y2="{y + half:.1f}" stroke="currentColor"/>'
                )
    for j, row in enumerate(rows):
        y = height + 14 * j
        parts.append(
            f'<rect x="{left}" y="{y}" width="9" height="9" fill="{COLOURS[j % len(COLOURS)]}" '
            f'fill-opacity="{1.0 if j < len(COLOURS) else 0.5}"/>'
            f'<text x="{left + 14}" y="{y + 9}">{html.escape(row.label)}</text>'
        )
    return "".join([*parts, "</svg>"])


def svg_chart(curve: Curve, width: int = 320, height: int = 180) -> str:
    """A line chart as inline SVG, with the extremes of both axes written out."""
    points = [point for line in curve.lines.values() for point in line]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    left, top, right, bottom = 52, 8, 8, 22
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0
    inner_width, inner_height = width - left - right, height - top - bottom

    def place(x: float, y: float) -> str:
        return f"{left + (x - low_x) / span_x * inner_width:.1f},{top + (high_y - y) / span_y * inner_height:.1f}"

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(curve.title, quote=True)}">',
        f"<title>{html.escape(curve.title)}</title>",
        f'<rect x="{left}" y="{top}" width="{inner_width}" height="{inner_height}" class="frame"/>',
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end">{high_y:.4g}</text>',
        f'<text x="{left - 4}" y="{top + inner_height}" text-anchor="end">{low_y:.4g}</text>',
        f'<text x="{left}" y="{height - 6}">{low_x:.0f}</text>',
        f'<text x="{width - right}" y="{height - 6}" text-anchor="end">step {high_x:.0f}</text>',
    ]
    for i, (name, line) in enumerate(sorted(curve.lines.items())):
        path = " ".join(place(x, y) for x, y in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.4">'
            f"<title>{html.escape(name)}</title></polyline>"
        )
    return "".join([*parts, "</svg>"])
