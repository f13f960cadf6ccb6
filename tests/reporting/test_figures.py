"""Test how figures are drawn from records, stored next to the records, and checked with the pages that show them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from assemble.reporting import charts, render
from assemble.reporting.claims import Judged
from assemble.reporting.papers import paper_named
from assemble.reporting.promote import promote
from assemble.reporting.tables import load
from tests.reporting.conftest import TABLES, MakeRecord, Saved, out_of_date, rendered

CURVE = """\
    curve:
      x: steps & more
      at: [1, 4]
      paper: 2
      panels: {score: {New: "New.m{x}", One: "New-One.m{x}"}, gain: {less: "`New longer`.m{x} - 2 * New.m{x}"}}
    metrics:
      m1: {label: UCF, stage: ucf_1, key: test/top1, hidden: true}
      m4: {label: ESC, stage: esc, key: test/top1, hidden: true}
"""
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def drawn(project: Path) -> Path:
    """Add a curve to a table, and return the path of its figure."""
    (project / "papers" / "mct" / "tables.yaml").write_text(TABLES.replace("    metrics:\n", CURVE))
    return project / "papers" / "mct" / "results" / "mini" / "transfer.svg"


def words(drawing: str) -> dict[str | None, tuple[float, float]]:
    texts = ElementTree.fromstring(drawing).iter(f"{SVG}text")
    return {text.text: (float(text.attrib.get("x", 0)), float(text.attrib.get("y", 0))) for text in texts}


def paths(drawing: str, color: str) -> list[list[tuple[float, float]]]:
    """Return the points of the lines of a color."""
    found = [path for path in ElementTree.fromstring(drawing).iter(f"{SVG}path") if color in path.attrib["style"]]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.attrib["d"])] for path in found
    ]


def test_a_line_for_what_was_measured_at_two_places(drawn: Path, make_record: MakeRecord) -> None:
    values = {("ucf_1@base", 0): 20, ("ucf_1@base", 1): 40, ("esc@base", 0): 60, ("esc@base", 1): 80}
    some = [make_record(stage, seed, value) for (stage, seed), value in values.items()]
    some.append(make_record("ucf_1@better", 0, 50.0))  # a single place gives no line
    (filled,) = render.fill(load("mct"), "mini", some)
    drawing = charts.curve(filled.result)
    band, ((left, first), (right, last)), _, ((_, third), (_, fourth)) = paths(drawing, charts.BLUE)
    assert left < right
    # The means are 30 and 70 (-30 and -70 in the second panel), each with an interval of ± 127.
    height = first - last
    assert (max(y for _, y in band) - first) / height == pytest.approx(127.06 / 40, abs=0.05)
    assert fourth - third == pytest.approx(height, abs=0.2)
    assert {"New", "less", "steps & more", "score", "gain", "1", "4"} <= set(words(drawing))
    assert (words(drawing)["New"], words(drawing)["less"]) == ((632, 26), (632, 326))
    # Each panel has a zero line and an axis. The second panel is 300 pixels below the first.
    assert [path[0][1] for path in paths(drawing, charts.LINE)] == pytest.approx([171, 254, 397, 554], abs=0.2)
    assert "One" not in words(drawing)
    assert charts.caption(filled.result) == "score and gain against steps & more; the bands are 95 % intervals"
    assert words(drawing)["band: 95 % interval"] == (632, 344)
    assert words(drawing)["dashed: the paper"] == (632, 362)
    marks = [x for path in paths(drawing, charts.DIM) for x, _ in path]
    assert marks == pytest.approx([(left + right) / 2] * 4, abs=0.2)  # 2 is the middle of a log axis from 1 to 4
    # The interval of a percentage stops at 0 and 100. The interval of a difference does not.
    drawn.parents[2].joinpath("tables.yaml").write_text(
        TABLES.replace("    metrics:\n", CURVE.replace("hidden: true", 'hidden: true, unit: "%"'))
    )
    (filled,) = render.fill(load("mct"), "mini", some)
    band, ((_, first), (_, last)), difference, _ = paths(charts.curve(filled.result), charts.BLUE)
    height = (first - last) / 40
    assert [*map(round, (min(y for _, y in band) - last, max(y for _, y in band) - first))] == [
        round(-30 * height), round(30 * height)
    ]  # fmt: skip
    assert max(y for _, y in difference) - min(y for _, y in difference) > 200


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_dots_show_means_intervals_draws_and_yours(project: Path, make_record: MakeRecord, scale: str) -> None:
    (project / "papers" / "mct" / "tables.yaml").write_text(
        TABLES.replace("title: Transfer", "chart: true\n    title: T")
    )
    folds = (1,) if scale == "mini" else (1, 2)
    values = {("base", 0): 80.0, ("base", 1): 84.0, ("better", 0): 90.0, ("better", 1): 94.0}
    some = [make_record(f"ucf_{k}@{m}", seed, v, scale=scale) for (m, seed), v in values.items() for k in folds]
    (filled,) = render.fill(load("mct"), scale, some)
    (yours,) = render.fill(load("mct"), scale, [make_record(f"ucf_{k}@base", 0, 82.0, scale=scale) for k in folds])
    drawing = charts.dots(filled.result, yours.result)
    assert charts.caption(filled.result)
    rows = 3 if scale == "mini" else 2  # our own row exists only in the miniature
    interval, means = paths(drawing, charts.BLUE)
    (ticks,) = paths(drawing, charts.DIM)
    assert (len(interval), len(means), len(ticks)) == (2 * rows, 2 * rows, 4 * rows)
    # The axis is zoomed, so the distance of 80 and 94 is most of its width.
    assert max(x for x, _ in ticks) - min(x for x, _ in ticks) > 0.75 * 480
    (mine,) = paths(drawing, charts.GREEN)
    assert mine[0][0] == means[0][0]
    # A value of the miniature is never compared with a published value.
    assert len(paths(drawing, charts.ORANGE)) == (scale == "paper")
    assert {"UCF (%)", "New", "New-One"} <= set(words(drawing))
    assert "ESC" not in words(drawing)


def test_a_reference_row_does_not_span_the_axis(project: Path, make_record: MakeRecord) -> None:
    file, row = project / "papers" / "mct" / "tables.yaml", "{label: New-One, model: better"
    assert row in TABLES
    file.write_text(
        TABLES.replace(row, row.replace("{", "{reference: true, ")).replace("title: T", "chart: true\n    title: T")
    )
    values = {("base", 0): 10.0, ("base", 1): 14.0, ("better", 0): 100.0, ("better", 1): 100.0}
    some = [make_record(f"ucf_1@{model}", seed, value) for (model, seed), value in values.items()]
    (filled,) = render.fill(load("mct"), "mini", some)
    (ticks,) = paths(charts.dots(filled.result), charts.DIM)
    assert max(x for x, _ in ticks) - min(x for x, _ in ticks) > 0.75 * 480
    assert "100 →" in words(charts.dots(filled.result))


def test_a_drawing_is_the_same_again_and_holds_nothing_that_a_page_could_hold_twice() -> None:
    lines = {"seed 0": [(0.0, 1.0), (10.0, 0.0)], "seed 1": [(5.0, 0.5)], "seed 2": []}
    band = [(0.0, 0.0, 2.0), (10.0, 0.0, 1.0)]
    drawing = charts.training("a & <b> $x$", lines, band)
    charts._training.cache_clear()
    assert charts.training("a & <b> $x$", lines, band) == drawing
    assert not re.search(r"\bid=|url\(|<use|<metadata|xml:|20\d\d-", drawing)
    # Viewers without CSS variables and media queries show the light colors. A browser overrides them in dark mode.
    assert "var(" not in drawing
    assert f'svg [style*="stroke: {charts.BLUE}"] {{stroke: {charts.COLORS["blue"][1]} !important}}' in drawing
    assert [len(paths(drawing, color)) for color in (charts.BLUE, charts.ORANGE)] == [1, 1]
    assert "a & <b> $x$" in words(drawing)
    assert ElementTree.fromstring(drawing).attrib["aria-label"].endswith("seed 0: 0 at the end, seed 1: 0.5 at the end")


def test_what_no_record_stands_for_is_found_and_goes(drawn: Path, saved: Saved) -> None:
    saved("esc@base", 0, 50.0)
    promote("mct")
    rendered()
    other = drawn.with_name("a_table_of_old.svg")
    other.write_text("<svg/>")
    assert out_of_date() == [other]
    rendered()
    assert out_of_date() == []
    assert not other.exists()


def test_pages_and_figures_are_checked_together(drawn: Path, saved: Saved) -> None:
    for stage in ("ucf_1@base", "esc@base"):
        saved(stage, 0, 50.0)
    promote("mct")
    readme = paper_named("mct").readme
    assert out_of_date() == [readme, drawn, readme.parents[2] / "README.md"]
    assert rendered()
    assert out_of_date() == []
    assert not rendered()
    assert "![score and gain against steps & more; the bands are" in readme.read_text()
    assert "](results/mini/transfer.svg)" in readme.read_text()
    drawn.write_text(drawn.read_text().replace("score", "other"))
    assert out_of_date() == [drawn]


def test_margins_count_all_claims_of_a_paper(project: Path, saved: Saved) -> None:
    for seed in (0, 1):
        saved("ucf_1@base", seed, 50.0)
        saved("ucf_1@better", seed, 60.0 + seed)
    promote("mct")
    assert "MCT: 1 holds; 1 of 1 shown" in words(str(render.margins_figure()))


def test_margins_show_ours_and_the_papers_on_one_axis() -> None:
    def judged(paper: str, verdict: str, difference: float) -> Judged:
        check: Any = SimpleNamespace(text=f"A beats B by {paper}")
        return Judged(check, "table", "mini", paper, verdict, difference, (difference - 1, difference + 1))

    held, failed = judged("+2", "holds", 2.0), judged("+0.5", "fails", -5.0)
    drawn = charts.margins({"One": [held], "Two": [failed]})
    assert {"One", "Two", "A beats B by +2", "A beats B by +0.5"} <= set(words(drawn))
    (_, (ours, *_)), (_, (behind, *_)) = paths(drawn, charts.GREEN), paths(drawn, charts.ORANGE)
    first, second = (path[0][0] for path in paths(drawn, charts.INK) if len(path) == 2)
    zero = next(path[0][0] for path in paths(drawn, charts.LINE) if path[0][0] == path[-1][0])
    assert behind[0] < zero < second < ours[0] == first
    assert behind[1] > ours[1]
    assert render.prominent([held] * 9 + [replace(held, paper=""), failed]) == [failed, *[held] * 5]
    assert charts.strips([(replace(held, difference=None), None)]) == []
