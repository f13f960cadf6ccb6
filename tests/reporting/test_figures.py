"""Figures are drawn from records, lie beside them, and are checked with the pages that show them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.reporting import figures, render
from common.reporting.papers import paper_named
from common.reporting.promote import promote
from common.reporting.records import Record
from common.reporting.tables import load
from tests.reporting.conftest import TABLES

CURVE = "curve: {x: steps & more, y: score, points: {4: esc, 1: ucf}}\n    title: Transfer"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def drawn(project: Path) -> Path:
    """The file of the figure of a table with a curve."""
    assert "title: Transfer" in TABLES
    (project / "papers" / "mct" / "tables.yaml").write_text(TABLES.replace("title: Transfer", CURVE))
    return project / "papers" / "mct" / "results" / "mini" / "transfer.svg"


def points(shape: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in shape.attrib["points"].split()]  # type: ignore[misc]


def test_a_line_for_every_measured_row(drawn: Path, make_record: Callable[..., Record]) -> None:
    values = {("ucf_1@base", 0): 20, ("ucf_1@base", 1): 40, ("esc@base", 0): 60, ("esc@base", 1): 80}
    some = [make_record(stage, seed, value) for (stage, seed), value in values.items()]
    some.append(make_record("ucf_1@better", 0, 50.0))  # at one place only: no line
    (filled,) = render.fill(load("mct"), "mini", some)
    picture = ElementTree.fromstring(figures.curve(filled.result))
    lines = [points(line) for line in picture.findall(f"{SVG}polyline")]
    bands = [points(band) for band in picture.findall(f"{SVG}polygon")]
    assert len(lines) == len(bands) == 2  # New, and New longer, which is the same model
    (left, first), (right, last) = lines[0]
    assert left < right
    # The axis ends at 100: means of 30 and 70 lie that far up, and the deviations of 14.1 about them.
    (bottom,) = [float(line.attrib["y1"]) for line in picture.findall(f"{SVG}line")][:1]
    top = [float(line.attrib["y1"]) for line in picture.findall(f"{SVG}line")][4]
    height = bottom - top
    assert (bottom - first) / height == pytest.approx(0.30, abs=0.003)
    assert (bottom - last) / height == pytest.approx(0.70, abs=0.003)
    assert (first - bands[0][0][1]) / height == pytest.approx(0.1414, abs=0.003)
    assert (bands[0][3][1] - first) / height == pytest.approx(0.1414, abs=0.003)
    words = [text.text for text in picture.iter(f"{SVG}text")]
    assert {"New", "New longer", "steps & more", "score", "1", "4", "100"} <= set(words)
    assert "New-One" not in words


def test_nothing_to_draw(drawn: Path, project: Path, make_record: Callable[..., Record]) -> None:
    assert figures.curve(render.fill(load("mct"), "mini", [make_record()])[0].result) == ""
    (project / "papers" / "mct" / "tables.yaml").write_text(TABLES)
    assert figures.curve(render.fill(load("mct"), "mini", [make_record()])[0].result) == ""


def test_bars_where_a_table_asks_for_them(drawn: Path, project: Path, make_record: Callable[..., Record]) -> None:
    text = TABLES.replace("title: Transfer", "chart: true\n    title: Transfer")
    (project / "papers" / "mct" / "tables.yaml").write_text(text)
    values = {("ucf_1@base", 0): 20, ("ucf_1@base", 1): 40, ("ucf_1@better", 0): 60}
    some = [make_record(stage, seed, value) for (stage, seed), value in values.items()]
    (filled,) = render.fill(load("mct"), "mini", some)
    drawing, told = figures.figure(filled.result)
    assert "dot for each draw" in told
    picture = ElementTree.fromstring(drawing)
    shown = {row.label: cell for row in filled.result.rows if (cell := filled.result.cells[row.label, "ucf"]).values}
    bars = [float(bar.attrib["width"]) for bar in picture.iter(f"{SVG}rect") if bar.attrib.get("class") == "bar"]
    means = [cell.mean or 0.0 for cell in shown.values()]
    # One panel, since no other metric has two rows; as long as the values are large.
    assert len(bars) == len(means) > 1
    assert [bar / bars[0] for bar in bars] == pytest.approx([mean / means[0] for mean in means], rel=1e-2)
    dots = list(picture.iter(f"{SVG}circle"))
    assert len(dots) == sum(len(cell.values) for cell in shown.values() if len(cell.values) > 1)
    words = {text.text for text in picture.iter(f"{SVG}text")}
    assert set(shown) <= words
    (project / "papers" / "mct" / "tables.yaml").write_text(TABLES)
    assert figures.figure(render.fill(load("mct"), "mini", some)[0].result) == ("", "")


def test_what_no_record_stands_for_is_found_and_goes(
    drawn: Path, save: Callable[[Record], Path], make_record: Callable[..., Record]
) -> None:
    save(make_record("esc@base", 0, 50.0))
    promote("mct")
    render.render_paper("mct")
    render.render_overview()
    other = drawn.with_name("a_table_of_old.svg")
    other.write_text("<svg/>")
    assert render.check() == [other]
    render.render_paper("mct")
    assert render.check() == []
    assert not other.exists()


def test_pages_and_figures_are_checked_together(
    drawn: Path, save: Callable[[Record], Path], make_record: Callable[..., Record]
) -> None:
    for stage in ("ucf_1@base", "esc@base"):
        save(make_record(stage, 0, 50.0))
    promote("mct")
    render.render_overview()
    readme = paper_named("mct").readme
    assert render.check() == [readme, drawn]
    assert render.render_paper("mct")
    assert render.check() == []
    assert not render.render_paper("mct")
    assert "![score against steps & more; the bands are" in readme.read_text()
    assert "](results/mini/transfer.svg)" in readme.read_text()
    drawn.write_text(drawn.read_text().replace("score", "other"))
    assert render.check() == [drawn]
