"""Charts as inline SVG: verdicts, bars with spread and seeds, curves. Colors are the page's, by class."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from common.reporting import render
from common.reporting.aggregate import Cell, TableResult
from common.reporting.tables import Metric

Points = Sequence[tuple[float, float]]

SERIES = 6
"""How many lines of one chart differ in color."""

_WIDTH = 320
_CHARACTER = 6.0
"""Mean width of a character of a chart's text, in pixels."""


def svg_bars(result: TableResult) -> list[str]:
    """Measured cells of a table as bars: a chart for each metric, a bar for each row.

    A line shows the sample standard deviation over draws, a dot each draw. At paper scale alone, where the two can
    be compared, a mark shows the published value.

    Args:
        result: the filled table.

    Returns:
        A drawing for each shown metric of which at least two rows were measured.
    """
    charts = []
    for metric in result.table.metrics:
        cells = [(render.row_text(row), result.cells[row.label, metric.id]) for row in result.rows]
        measured = [(label, cell) for label, cell in cells if cell.mean is not None]
        if not metric.hidden and len(measured) > 1:
            charts.append(_bars(result, metric, measured))
    return charts


def _bars(result: TableResult, metric: Metric, rows: Sequence[tuple[str, Cell]]) -> str:
    compared = result.scale == "paper" and render.is_paired(result, metric)
    ends = [0.0]
    for _, cell in rows:
        spread = cell.spread or 0.0
        ends += [*cell.values.values(), (cell.mean or 0.0) - spread, (cell.mean or 0.0) + spread]
        ends += cell.published.ends if compared and cell.published else ()
    low, high = min(ends), max(ends)
    # A whisker that reaches below zero must not shift the bars of values that cannot.
    low = 0.0 if all(value >= 0 for _, cell in rows for value in cell.values.values()) else low
    span = (high - low) or 1.0
    inner, step, top = _WIDTH - 8, 30, 30

    def place(value: float) -> float:
        return 4 + (min(max(value, low), high) - low) / span * inner

    what = f"{result.table.title}, {metric.title}, measured at {result.scale}"
    height = top + step * len(rows) + 2
    parts = [
        f'<svg class="bars" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(what, quote=True)}">',
        f'<text class="heading" x="4" y="13">{html.escape(_fitted(metric.title, _WIDTH - 110))}</text>',
        f'<text class="dim" x="{_WIDTH - 4}" y="13" text-anchor="end">{result.scale}'
        f"{', lower is better' if metric.better == 'down' else ''}</text>",
        f'<line class="axis" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="{top - 6}" y2="{height - 2}"/>',
    ]
    for i, (label, cell) in enumerate(rows):
        assert cell.mean is not None
        y = top + i * step
        value = render.measured_text(cell, metric.decimals)
        draws = ", ".join(f"{draw}: {number:.4g}" for draw, number in sorted(cell.values.items()))
        left, right = sorted((place(0), place(cell.mean)))
        room = _WIDTH - 18 - _CHARACTER * len(value)
        parts += [
            f"<g><title>{html.escape(f'{label}, {metric.title}: {value}; {draws}')}</title>",
            f'<text x="8" y="{y + 6}">{html.escape(_fitted(label, room))}</text>',
            f'<text class="amount" x="{_WIDTH - 4}" y="{y + 6}" text-anchor="end">{value}</text>',
            f'<rect class="bar" x="{left:.1f}" y="{y + 10}" width="{max(right - left, 0.5):.1f}" height="10" rx="1"/>',
        ]
        if cell.spread is not None:
            start, end = place(cell.mean - cell.spread), place(cell.mean + cell.spread)
            parts.append(f'<line class="spread" x1="{start:.1f}" x2="{end:.1f}" y1="{y + 15}" y2="{y + 15}"/>')
            parts += [f'<circle class="seed" cx="{place(v):.1f}" cy="{y + 15}" r="2.5"/>' for v in cell.values.values()]
        for end in cell.published.ends if compared and cell.published else ():
            parts.append(
                f'<path class="mark" d="M{place(end):.1f} {y + 8}l4 4 -4 4 -4 -4z">'
                f"<title>published: {end:g}</title></path>"
            )
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _fitted(text: str, width: float) -> str:
    """Cut a text that is too long for its place; the whole stands in the drawing's title."""
    most = max(int(width / _CHARACTER), 4)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def svg_lines(
    title: str, lines: Mapping[str, Points], x_label: str = "step", band: Sequence[tuple[float, float, float]] = ()
) -> str:
    """A line chart, with the ends of both axes written out.

    Args:
        title: what is drawn.
        lines: name to (x, y) points; at least one point in all.
        x_label: what the horizontal axis counts.
        band: (x, lowest, highest) of what the lines are compared with, drawn behind them.
    """
    points = [point for line in lines.values() for point in line]
    points += [(x, y) for x, *ends in band for y in ends]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    height, left, top, right, bottom = 180, 50, 24, 8, 20
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0
    inner_width, inner_height = _WIDTH - left - right, height - top - bottom
    base = top + inner_height

    def place(x: float, y: float) -> tuple[int, int]:
        """Tenths of a pixel: whole numbers keep a page with hundreds of curves small."""
        return (
            round(10 * (left + (x - low_x) / span_x * inner_width)),
            round(10 * (top + (high_y - y) / span_y * inner_height)),
        )

    ends = ", ".join(f"{name}: {line[-1][1]:.4g} at the end" for name, line in lines.items() if line)
    parts = [
        f'<svg class="lines" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(f"{title} by {x_label}; {ends}", quote=True)}">',
        f'<text class="heading" x="4" y="13">{html.escape(_fitted(title, _WIDTH))}</text>',
        f'<rect class="frame" x="{left}" y="{top}" width="{inner_width}" height="{inner_height}"/>',
        f'<text x="{left - 5}" y="{top + 9}" text-anchor="end">{_number(high_y)}</text>',
        f'<text x="{left - 5}" y="{base}" text-anchor="end">{_number(low_y)}</text>',
        f'<text x="{left}" y="{height - 5}">{_number(low_x)}</text>',
        f'<text x="{_WIDTH - right}" y="{height - 5}" text-anchor="end">'
        f"{html.escape(x_label)} {_number(high_x)}</text>",
    ]
    if band:
        outline = [place(x, low) for x, low, _ in band] + [place(x, high) for x, _, high in reversed(band)]
        corners = " ".join(f"{x} {y}" for x, y in outline)
        parts.append(
            f'<path class="recorded" transform="scale(.1)" d="M{corners}Z"><title>recorded draws</title></path>'
        )
    for i, (name, line) in enumerate(lines.items()):
        if not line:
            continue
        x, y = place(*line[0])
        path = [f"M{x} {y}"]
        if len(line) == 1:
            path.append("h1")
        for point in line[1:]:
            next_x, next_y = place(*point)
            path.append(f"l{next_x - x} {next_y - y}")
            x, y = next_x, next_y
        parts.append(
            f'<path class="series-{i % SERIES}" transform="scale(.1)" d="{"".join(path)}">'
            f"<title>{html.escape(name)}</title></path>"
        )
    return "".join([*parts, "</svg>"])


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    digits = 4 if not value else max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
