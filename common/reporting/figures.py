"""Figures of tables as SVG: the same text from the same records, so that a page and its figures can be checked."""

from __future__ import annotations

import html
import math

from common.reporting.aggregate import TableResult

COLOURS = ("#4a4a4a", "#c2571a", "#a8842c", "#3266ad", "#2f8f5b", "#8a4fae")
_WIDTH, _HEIGHT = 640, 300
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 14, 150, 46


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
        color = COLOURS[number % len(COLOURS)]
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
