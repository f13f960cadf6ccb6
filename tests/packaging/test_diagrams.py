"""The drawn methods: files are what the script draws, texts lie in their boxes, boxes on the picture and apart."""

from __future__ import annotations

import runpy
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
