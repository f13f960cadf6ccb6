"""Figures of tables as SVG: the same text from the same records, so that a page and its figures can be checked."""

from __future__ import annotations

import html
import math

from common.reporting.aggregate import TableResult

COLORS = ("#4a4a4a", "#c2571a", "#a8842c", "#3266ad", "#2f8f5b", "#8a4fae", "#b8396b")
_WIDTH, _HEIGHT = 640, 300
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 14, 150, 46


#: Of bars: columns of panels, width of one, height of a row, panels at most, and the look on a light and a dark screen.
_COLUMNS, _PANEL, _ROW, _MOST = 2, 316, 30, 6
_STYLE = (
    "text{fill:#1f2328}.dim{fill:#59636e}.ground{fill:#ffffff}.bar{fill:#3266ad;fill-opacity:.55}"
    ".spread,.seed{stroke:#1f2328}.seed{fill:#ffffff}"
    "@media (prefers-color-scheme:dark){text{fill:#f0f3f6}.dim{fill:#a3adb8}.ground{fill:#161b22}.bar{fill:#6ba4ee}"
    ".spread,.seed{stroke:#f0f3f6}.seed{fill:#161b22}}"
)


def figure(result: TableResult) -> tuple[str, str]:
    """What stands below a table: its curve, else bars where it asks for them (`chart`).

    Args:
        result: the filled table.

    Returns:
        An SVG document and what it shows; both empty when there is nothing to draw.
    """
    if drawn := curve(result):
        assert result.table.curve is not None
        text = f"{result.table.curve.y} against {result.table.curve.x}; the bands are standard deviations over draws"
        return drawn, text
    if result.table.chart and (drawn := bars(result)):
        return drawn, "The cells as bars, with standard deviations over draws and a dot for each draw"
    return "", ""


def bars(result: TableResult) -> str:
    """Measured cells of a table as bars: a panel for each of its first metrics, a bar for each row.

    A line shows the standard deviation over draws, a dot each draw.

    Args:
        result: the filled table.

    Returns:
        An SVG document; empty when no shown metric was measured for two rows.
    """
    panels = []
    for metric in result.table.metrics:
        cells = [(row.label, result.cells[row.label, metric.id]) for row in result.rows]
        measured = [(label, cell) for label, cell in cells if cell.mean is not None]
        if not metric.hidden and len(measured) > 1:
            panels.append((metric, measured))
    panels = panels[:_MOST]
    if not panels:
        return ""
    tallest = 30 + _ROW * max(len(measured) for _, measured in panels)
    height = math.ceil(len(panels) / _COLUMNS) * tallest + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" font-family="sans-serif" '
        'font-size="11">',
        f"<title>{html.escape(f'{result.table.title} ({result.scale})')}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="6"/>',
    ]
    for number, (metric, measured) in enumerate(panels):
        left, top = 8 + number % _COLUMNS * (_PANEL + 4), 8 + number // _COLUMNS * tallest
        values = [value for _, cell in measured for value in cell.values.values()]
        values += [(cell.mean or 0.0) + (cell.spread or 0.0) for _, cell in measured]
        low, high = min(0.0, *values), max(0.0, *values)

        def x(value: float, low: float = low, high: float = high, left: int = left) -> float:
            return left + (min(max(value, low), high) - low) / ((high - low) or 1.0) * (_PANEL - 12)

        name = metric.title + (", lower is better" if metric.better == "down" else "")
        parts.append(f'<text x="{left}" y="{top + 12}" font-weight="600">{html.escape(name)}</text>')
        for row, (label, cell) in enumerate(measured):
            y, mean, spread = top + 22 + row * _ROW, cell.mean or 0.0, cell.spread
            text = f"{mean:.{metric.decimals}f}" + (f" ± {spread:.{metric.decimals}f}" if spread is not None else "")
            start, end = sorted((x(0.0), x(mean)))
            parts += [
                f'<text class="dim" x="{left}" y="{y + 9}">{html.escape(_cut(label, 36))}</text>',
                f'<text x="{left + _PANEL - 12}" y="{y + 9}" text-anchor="end">{text}</text>',
                f'<rect class="bar" x="{start:.1f}" y="{y + 13}" width="{max(end - start, 0.5):.1f}" height="9"/>',
            ]
            if spread is not None:
                ends = f'x1="{x(mean - spread):.1f}" x2="{x(mean + spread):.1f}"'
                parts.append(f'<line class="spread" {ends} y1="{y + 17.5}" y2="{y + 17.5}"/>')
                dots = sorted(x(value) for value in cell.values.values())
                parts += [f'<circle class="seed" cx="{dot:.1f}" cy="{y + 17.5}" r="2.5"/>' for dot in dots]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def curve(result: TableResult) -> str:
    """The curve of a table: a line for every measured row, with the spread over draws as a band.

    The x axis is logarithmic, the y axis starts at 0.

    Args:
        result: the filled table.

    Returns:
        An SVG document; empty when the table has no curve, or no row of it was measured at two places.
    """
    drawn = result.table.curve
    if drawn is None:
        return ""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in result.rows:
        cells = [(place, result.cells[row.label, metric]) for place, metric in drawn.points.items()]
        line = [(place, cell.mean, cell.spread or 0.0) for place, cell in cells if cell.mean is not None]
        if len(line) > 1:
            lines[row.label] = line
    if not lines:
        return ""
    places = sorted({place for line in lines.values() for place, _, _ in line})
    top = _round_up(max(mean + spread for line in lines.values() for _, mean, spread in line))
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(place: float) -> float:
        return _LEFT + math.log(place / places[0]) / math.log(places[-1] / places[0]) * inner_width

    def y(value: float) -> float:
        return _TOP + (1 - max(value, 0.0) / top) * inner_height

    title = html.escape(f"{result.table.title} ({result.scale})")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{title}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for tick in range(5):
        value = top * tick / 4
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + inner_width}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    # As many places as have room for their numbers.
    for place in places[:: math.ceil(len(places) * 38 / inner_width)]:
        parts.append(f'<text x="{x(place):.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{place:g}</text>')
    parts.append(
        f'<text x="{_LEFT + inner_width / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(drawn.x)}</text>'
    )
    middle = _TOP + inner_height / 2
    parts.append(
        f'<text x="12" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 12 {middle:.1f})">'
        f"{html.escape(drawn.y)}</text>"
    )
    for number, (label, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        upper = [f"{x(place):.1f},{y(mean + spread):.1f}" for place, mean, spread in line]
        lower = [f"{x(place):.1f},{y(mean - spread):.1f}" for place, mean, spread in reversed(line)]
        parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{color}" fill-opacity="0.15"/>')
        path = " ".join(f"{x(place):.1f},{y(mean):.1f}" for place, mean, _ in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        key = _TOP + 8 + 18 * number
        start = _LEFT + inner_width + 12
        parts.append(f'<line x1="{start}" x2="{start + 18}" y1="{key}" y2="{key}" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{start + 24}" y="{key + 4}">{html.escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _round_up(value: float) -> float:
    """The next larger of 1, 2, 4, 6, 8, 10 times a power of ten: its quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if value <= step * power or step == 10)
