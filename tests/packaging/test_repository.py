"""The image installs the lock for a user; the drawings are those of their script."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from common.reporting.papers import existing_papers
from tests.architecture.sources import ROOT


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_what_is_copied_is_here_and_the_lock_is_what_is_installed() -> None:
    found = instructions()
    copied = [rest.split()[1:-1] for name, rest in found if name == "COPY"]
    assert copied == [["requirements.lock"], ["."]]
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    (sync,) = (rest for name, rest in found if name == "RUN" and "uv pip sync" in rest)
    assert "--require-hashes requirements.lock" in sync
    assert any(name == "RUN" and rest.endswith("make setup") for name, rest in found)
    assert [rest for name, rest in found if name == "USER"] not in ([], ["root"])


FOLDER = ROOT / "docs" / "images"
SCRIPT: dict[str, Any] = runpy.run_path(str(FOLDER / "diagrams.py"))
#: A method is drawn once somebody draws it: a new paper has none at first.
PAPERS = [paper.name for paper in existing_papers() if paper.name in SCRIPT["DRAWINGS"]]


def test_every_paper_has_one_on_its_page() -> None:
    assert set(SCRIPT["DRAWINGS"]) == set(PAPERS)  # none of a paper that is not there
    for paper in PAPERS:
        assert f"images/{paper}.svg)" in (ROOT / "papers" / paper / "README.md").read_text(encoding="utf-8"), paper


@pytest.mark.parametrize("paper", PAPERS)
def test_the_file_is_what_the_script_draws(paper: str) -> None:
    drawn = SCRIPT["DRAWINGS"][paper]().svg()
    assert (FOLDER / f"{paper}.svg").read_text(encoding="utf-8") == drawn, "run python docs/images/diagrams.py"
