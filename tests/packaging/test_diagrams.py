"""The drawn methods: files are what the script draws, texts lie in their boxes, boxes on the picture and apart."""

from __future__ import annotations

import runpy
from itertools import combinations
from typing import Any

import pytest

from common.reporting.papers import existing_papers
from tests.architecture.sources import ROOT

FOLDER = ROOT / "docs" / "images"
SCRIPT: dict[str, Any] = runpy.run_path(str(FOLDER / "diagrams.py"))
#: A method is drawn once somebody draws it: a new paper has none at first.
PAPERS = [paper.name for paper in existing_papers() if paper.name in SCRIPT["DRAWINGS"]]


def test_every_paper_has_one_on_its_pages() -> None:
    assert set(SCRIPT["DRAWINGS"]) == set(PAPERS)  # none of a paper that is not there
    for paper in PAPERS:
        for page in (ROOT / "papers" / paper / "README.md", ROOT / "docs" / "papers" / f"{paper}.md"):
            assert f"images/{paper}.svg)" in page.read_text(encoding="utf-8"), page


@pytest.mark.parametrize("paper", PAPERS)
def test_the_file_is_what_the_script_draws(paper: str) -> None:
    drawn = SCRIPT["DRAWINGS"][paper]().svg()
    assert (FOLDER / f"{paper}.svg").read_text(encoding="utf-8") == drawn, "run python docs/images/diagrams.py"


@pytest.mark.parametrize("paper", PAPERS)
def test_nothing_overlaps(paper: str) -> None:
    drawing = SCRIPT["DRAWINGS"][paper]()
    for box in drawing.boxes:
        widest = max([len(box.title) * SCRIPT["TITLE"], *(len(line) * SCRIPT["LINE"] for line in box.lines)])
        assert widest <= box.width, f"{box.title}: its text is wider than its box"
        assert 16 * (1 + len(box.lines)) + 4 <= box.height, f"{box.title}: its text is higher than its box"
        assert box.x >= 0
        assert box.x + box.width <= SCRIPT["WIDTH"]
        assert box.y >= 0
        assert box.y + box.height <= drawing.height
    for one, two in combinations(drawing.boxes, 2):
        apart = (
            one.x + one.width < two.x
            or two.x + two.width < one.x
            or one.y + one.height < two.y
            or two.y + two.height < one.y
        )
        assert apart, f"{one.title} lies on {two.title}"
    for x, y, text, anchor in drawing.notes:
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * len(text) * SCRIPT["LINE"]
        assert left >= 0
        assert left + len(text) * SCRIPT["LINE"] * 0.93 <= SCRIPT["WIDTH"], text
        assert y + 4 <= drawing.height
        for box in drawing.boxes:
            beside = x > box.x + box.width or left + len(text) * SCRIPT["LINE"] < box.x
            assert beside or y < box.y - 1 or y - 11 > box.y + box.height, f"{text!r} lies on {box.title}"
