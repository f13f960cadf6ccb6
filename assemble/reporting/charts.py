"""Draw dot plots, table curves and training curves as deterministic SVG in the report page's colors."""

from __future__ import annotations

import functools
import html
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from assemble.reporting.aggregate import TableResult
from assemble.reporting.claims import FAILS, HOLDS, Judged, interval_of, judge, seed_means
from common.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

#: The colors of `report.css` in light and dark mode.
COLORS = {
    "ink": ("#1b1f24", "#e6e9ed"), "dim": ("#5a6470", "#a0a9b4"), "line": ("#d5dae0", "#363d46"),
    "ground": ("#fefefe", "#14171b"), "blue": ("#0072b2", "#4aa3dc"), "orange": ("#b86e00", "#e6a03c"),
    "green": ("#00795a", "#35b58d"), "pink": ("#a8487c", "#d98ab5"), "sky": ("#2f8fc6", "#8acbf2"),
    "gray": ("#8a939d", "#7b8591"),
}  # fmt: skip
LIGHT = [light for light, _ in COLORS.values()]
INK, DIM, LINE, GROUND, BLUE, ORANGE, GREEN, *_ = LIGHT
SERIES = (BLUE, ORANGE, GREEN, LIGHT[7], LIGHT[9], INK)
#: Pixels: widths of a figure and of a training curve, height of a row, widths of a letter and of a bold letter.
_WIDTH, _SMALL, _ROW, _LETTER, _BOLD = 760, 320, 18, 6, 7
_ACROSS = 3
_BAND, _PAPER = "band: 95 % interval", "dashed: the paper"


class _Dot(NamedTuple):
    row: str
    mean: float
    interval: tuple[float, float] | None
    draws: tuple[float, ...]
    published: tuple[float, ...]
    yours: float | None
    reference: bool = False


def caption(result: TableResult) -> str:
    """Return the caption of a table's figure, or an empty text if the table has none."""
    if result.table.curve and (panels := _curve_panels(result)):
        return f"{' and '.join(panels)} against {result.table.curve.x}; the bands are 95 % intervals"
    if result.table.chart and _panels(result):
        return "Dots are means over seeds, lines are 95 % intervals (cut at the edge), and ticks are single draws"
    return ""


def dots(result: TableResult, yours: TableResult | None = None) -> str:
    """Draw measured cells as dots, one zoomed panel per metric. Return an empty text for fewer than two rows."""
    panels = _panels(result, yours)
    return _dots(f"{result.table.title} ({result.scale})", panels) if panels else ""


def _panels(result: TableResult, yours: TableResult | None = None) -> tuple[tuple[str, tuple[_Dot, ...]], ...]:
    panels = []
    for metric in result.table.metrics:
        dots = []
        for row in result.rows:
            cell = result.cells[row.label, metric.id]
            if cell.mean is not None and not metric.hidden:
                draws = tuple(sorted(cell.values.values()))
                means = seed_means(cell.values)
                published = cell.published.ends if cell.published and result.scale == "paper" else ()
                theirs = seed_means(yours.cells[row.label, metric.id].values) if yours else []
                average = statistics.fmean(theirs) if theirs else None
                mean, interval = statistics.fmean(means), interval_of(means)
                dots.append(_Dot(row.label, mean, interval, draws, published, average, row.reference))
        if len(dots) > 1:
            panels.append((metric.title + " ↓" * (metric.better == "down"), tuple(dots)))
    return tuple(panels)


@functools.lru_cache(1000)
def _dots(title: str, panels: tuple[tuple[str, tuple[_Dot, ...]], ...]) -> str:
    labels = list(dict.fromkeys(dot.row for _, dots in panels for dot in dots))
    left = _LETTER * max(map(len, labels)) + 14
    across = min(len(panels), _ACROSS, max(1, int((_WIDTH - left) / (_BOLD * max(len(name) for name, _ in panels)))))
    width, height = (_WIDTH - left) / across, _ROW * len(labels) + 56
    figure = new_figure(_WIDTH, height * math.ceil(len(panels) / across))
    for number, (name, dots) in enumerate(panels):
        line, column = divmod(number, across)
        axis = add_axes(figure, left + width * column, height * line + 26, width - 16, height - 56)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.yaxis.set_visible(False)
        add_text(figure, left + width * column, height * line + 18, name, fontweight="bold")
        for place, label in enumerate(labels if column == 0 else ()):
            top = height * line + 26 + _ROW * (place + 0.5) + 4
            add_text(figure, left - 7, top, label, horizontalalignment="right")
        usual = [dot for dot in dots if not dot.reference] or dots
        values = [v for dot in usual for v in (*dot.draws, dot.mean, *dot.published, dot.yours) if v is not None]
        room = 0.12 * (max(values) - min(values)) or 1.0
        low, high = min(values) - room, max(values) + room
        axis.set_xlim(low, high)
        spots = [(labels.index(dot.row), dot) for dot in dots if low <= dot.mean <= high]
        for dot in (dot for dot in dots if not low <= dot.mean <= high):
            beyond, x, top = dot.mean > high, left + width * column, height * line + 26 + _ROW * labels.index(dot.row)
            text = f"{dot.mean:.3g} →" if beyond else f"← {dot.mean:.3g}"
            align = "right" if beyond else "left"
            add_text(figure, x + (width - 16) * beyond, top + 13, text, color=BLUE, horizontalalignment=align)
        ends = [(y, dot.interval) for y, dot in spots if dot.interval]
        _strokes(axis, [(low, y, high, y) for y, _ in spots], LINE, 1)
        _strokes(axis, [(max(left, low), y, min(right, high), y) for y, (left, right) in ends], BLUE, 2)
        _strokes(axis, [(v, y - 0.25, v, y + 0.25) for y, dot in spots for v in dot.draws], DIM, 1)
        _strokes(axis, [(dot.mean, y, dot.mean, y) for y, dot in spots], BLUE, 7)
        _strokes(axis, [(v, y - 0.4, v, y + 0.4) for y, dot in spots for v in dot.published], ORANGE, 3)
        _strokes(axis, [(v, y, v, y) for y, dot in spots if (v := dot.yours) is not None], GREEN, 7)
    return to_svg(figure, title)


def margins(groups: Mapping[str, Sequence[Judged]]) -> str:
    """Draw claims by paper: our margins as dots with 95 % intervals, the paper's as ticks. Beyond ±1, axes are log."""
    rows = [(name, judged) for name, group in groups.items() for judged in group]
    labels = _LETTER * max(len(judged.check.text) for _, judged in rows) + 20
    figure = new_figure(_WIDTH + 100, _ROW * (len(rows) + len(groups)) + 40)
    axis = add_axes(figure, labels, 4, _WIDTH + 88 - labels, _ROW * (len(rows) + len(groups)))
    ticks = (-10, -1, 0, 1, 10, 50)
    axis.set_xticks([*map(_bent, ticks)], [f"{tick:+}" if tick else "0" for tick in ticks])
    axis.set_ylim(len(rows) + len(groups) - 0.5, -0.5)
    axis.yaxis.set_visible(False)
    axis.axvline(0, color=LINE, linewidth=1)
    place = 0
    for name, group in groups.items():
        add_text(figure, 8, 4 + _ROW * (place + 0.5) + 4, name, fontweight="bold")
        for judged in group:
            place += 1
            color = {HOLDS: GREEN, FAILS: ORANGE}.get(judged.verdict, DIM)
            add_text(figure, 8, 4 + _ROW * (place + 0.5) + 4, judged.check.text)
            ends = judged.interval or (0.0, 0.0)
            ours, low, high = map(_bent, (judged.difference or 0.0, *ends))
            _strokes(axis, [(low, place, high, place)], color, 2)
            _strokes(axis, [(ours, place, ours, place)], color, 7)
            if judged.paper_margin is not None:
                papers = _bent(judged.paper_margin)
                _strokes(axis, [(papers, place - 0.3, papers, place + 0.3)], INK, 3)
        place += 1
    return to_svg(figure, "Margins of the papers' claims: the paper's, and ours at mini scale")


def _bent(value: float) -> float:
    return value if abs(value) <= 1 else math.copysign(1 + math.log10(abs(value)), value)


def strips(claims: Sequence[tuple[Judged, Judged | None]]) -> list[str]:
    """Draw one strip of a dot plot per claim, on the axis of `margins` but zoomed. A check gets an empty text.

    Dot and line are our mean and interval; the tick is the paper's margin. In each pair, the first judgment is of the
    recorded runs, the second of the user's.
    """

    def x(value: float) -> str:
        return f"{2 + 96 * (_bent(value) - low) / (high - low):.1f}%"

    def line(kind: str, left: float, right: float, y: tuple[int, int] = (50, 50)) -> str:
        return f'<line class="{kind}" x1="{x(left)}" x2="{x(right)}" y1="{y[0]}%" y2="{y[1]}%"/>'

    judged = [claim for pair in claims for claim in pair if claim and claim.paper]
    if all(claim.difference is None for claim in judged):
        return []
    values = [v for j in judged for v in (0.0, j.difference, j.paper_margin, *(j.interval or ())) if v is not None]
    low, high = _bent(min(values)), _bent(max(values) or 1.0)
    drawn = []
    for ours, yours in claims:
        parts = [line("zero", 0, 0, (0, 100))]
        if ours.interval:
            parts.append(line("interval", *ours.interval))
        if ours.paper_margin is not None:
            parts.append(line("paper", ours.paper_margin, ours.paper_margin, (15, 85)))
        for kind, claim in (("ours", ours), ("yours", yours)):
            if claim and claim.difference is not None:
                parts.append(f'<circle class="{kind}" cx="{x(claim.difference)}" cy="50%" r="5"/>')
        drawn.append(f'<svg class="strip {ours.verdict.replace(" ", "-")}" aria-hidden="true">{"".join(parts)}</svg>')
    return drawn


def curve(result: TableResult) -> str:
    """Draw the curve of a table: lines with at least two measured points, and their 95 % intervals as bands."""
    drawn, panels = result.table.curve, _curve_panels(result)
    if drawn is None or not panels:
        return ""
    figure = new_figure(_WIDTH, 300 * len(panels))
    right = _WIDTH - _LETTER * max(len(label) for lines in panels.values() for label in (*lines, _BAND)) - 14
    for panel, (y, lines) in enumerate(panels.items()):
        axis = add_axes(figure, 52, 300 * panel + 14, right - 64, 240)
        axis.set_xscale("log")
        axis.axhline(0, color=LINE, linewidth=1)
        if drawn.paper is not None:
            axis.axvline(drawn.paper, color=DIM, linewidth=1, linestyle="dashed")
            add_text(figure, right, 300 * panel + 44 + 18 * len(lines), _PAPER, color=DIM)
        places = sorted({place for line in lines.values() for place, *_ in line})
        # Label as many points as there is room for.
        shown = places[:: math.ceil(len(places) * 38 / (right - 64))]
        axis.set_xticks(shown, [f"{place:g}" for place in shown])
        axis.set_xticks([], minor=True)
        axis.set_xlabel(drawn.x, color=INK)
        axis.set_ylabel(y, color=INK)
        for number, (label, line) in enumerate(lines.items()):
            color = SERIES[number % len(SERIES)]
            _band(axis, [(place, low, high) for place, _, low, high in line], color, 0.2)
            axis.plot(*zip(*((place, mean) for place, mean, *_ in line)), color=color, linewidth=2, clip_on=False)
            add_text(figure, right, 300 * panel + 26 + 18 * number, label, color=color)
        add_text(figure, right, 300 * panel + 26 + 18 * len(lines), _BAND, color=DIM)
    return to_svg(figure, f"{result.table.title} ({result.scale})")


def _curve_panels(result: TableResult) -> dict[str, dict[str, list[tuple[float, float, float, float]]]]:
    """Return the points (x, mean, lower end, upper end of the interval) by panel and line."""
    bands: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for y, lines in result.table.curve.panels.items() if result.table.curve else ():
        for label, points in lines.items():
            judged = zip(points, judge(result, points.values()))
            coordinates = [(x, c.difference, _possible(c, result)) for x, c in judged if c.difference is not None]
            if len(coordinates) > 1:
                bands.setdefault(y, {})[label] = [(x, mean, *(ends or (mean, mean))) for x, mean, ends in coordinates]
    return bands


def _possible(judged: Judged, result: TableResult) -> tuple[float, float] | None:
    """Return the claim's interval. If the claim is about a single percentage, limit the interval to 0 to 100."""
    cells = judged.comparison.cells() if judged.comparison else ()
    if judged.interval and len(cells) == 1 and result.table.metric(cells[0].metric).unit == "%":
        return max(0.0, judged.interval[0]), min(100.0, judged.interval[1])
    return judged.interval


def training(title: str, lines: Mapping[str, Points], band: Sequence[tuple[float, float, float]] = ()) -> str:
    """Draw training curves: (step, value) points by name. `band` has (step, lowest, highest) of recorded runs."""
    return _training(title, tuple((name, tuple(points)) for name, points in lines.items()), tuple(band))


@functools.lru_cache(4000)
def _training(title: str, lines: tuple[tuple[str, Points], ...], band: tuple[tuple[float, float, float], ...]) -> str:
    figure = new_figure(_SMALL, 180)
    axis = add_axes(figure, 50, 24, _SMALL - 62, 132)
    add_text(figure, 4, 14, title, fontweight="bold")
    if band:
        _band(axis, band, LINE)
    for number, (_, points) in enumerate(lines):
        if points:
            axis.plot(*zip(*points), color=SERIES[number % len(SERIES)], linewidth=1.5, clip_on=False)
    ends = ", ".join(f"{name}: {points[-1][1]:.4g} at the end" for name, points in lines if points)
    return to_svg(figure, f"{title} by step; {ends}")


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), facecolor=GROUND)


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a position in pixels. The position does not depend on font sizes."""
    full_width, full_height = (72 * inches for inches in figure.get_size_inches())
    box = (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    axis = figure.add_axes(box)
    axis.patch.set_visible(False)
    axis.spines[["left", "right", "top"]].set_visible(False)
    axis.spines["bottom"].set_color(LINE)
    axis.tick_params(left=False, bottom=False, labelsize=11, colors=INK)
    axis.locator_params(nbins=4)
    return axis


def add_text(figure: Figure, x: float, y: float, text: str, **style: str) -> None:
    """Add text whose baseline is at a position in pixels."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    style = {"color": INK, **style}
    figure.text(x / width, 1 - y / height, printable(text).replace("$", r"\$"), fontsize=11, **style)  # type: ignore[arg-type]


def _strokes(axis: Axes, strokes: Sequence[tuple[float, float, float, float]], color: str, width: float) -> None:
    """Add lines (x1, y1, x2, y2) as one path. A line of zero length is a dot."""
    if strokes:
        gap = math.nan
        x = [value for left, _, right, _ in strokes for value in (left, right, gap)]
        y = [value for _, top, _, bottom in strokes for value in (top, bottom, gap)]
        ends = "round" if width > 5 else "butt"
        axis.plot(x, y, color=color, linewidth=width, solid_capstyle=ends, clip_on=False)


def _band(axis: Axes, points: Sequence[tuple[float, float, float]], color: str, alpha: float = 1.0) -> None:
    outline = [(x, low) for x, low, _ in points] + [(x, high) for x, _, high in reversed(points)]
    axis.fill(*zip(*outline), color=color, alpha=alpha, linewidth=0, clip_on=False)


def to_svg(figure: Figure, label: str) -> str:
    """Return a figure as SVG text that is the same on every machine. Drop ids, which would repeat on a page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "path.simplify": False}):
        FigureCanvasSVG(figure).print_svg(buffer)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r" (?:id|clip-path)=\"[^\"]*\"| transform=\"rotate\(-0 [^\"]*\"", "", text)
    text = re.sub(r"\s*</?g>", "", text)
    text = re.sub(r"<clipPath>.*?</clipPath>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font(-family)?: ((?:bold )?[\d.]+px )?[^;\"]*'[^;\"]*", r"font\1: \2sans-serif", text)
    shorter = functools.partial(re.compile(r"(\d+\.\d)\d+|\s*\n(?=[LMCQz\"])").sub, r"\1")
    text = re.sub(r"<[^>]+>", lambda tag: shorter(tag[0]), text).replace('pt"', '"')  # not in labels
    # Viewers other than browsers ignore media queries and variables, so the plain attributes hold the light colors.
    rules = [
        f'svg [style*="{kind}: {light}"] {{{kind}: {dark} !important}}'
        for light, dark in COLORS.values()
        for kind in ("fill", "stroke")
        if f"{kind}: {light}" in text
    ]
    style = f"@media (prefers-color-scheme: dark) {{{' '.join(rules)}}}"
    text = re.sub(r"(<style[^>]*>).*?(?=</style>)", lambda match: match[1] + style, text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(printable(label), quote=True)}" ', 1)
