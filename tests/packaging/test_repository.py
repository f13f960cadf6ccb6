"""The drawings are those of their script."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from tests.architecture.sources import ROOT

FOLDER = ROOT / "docs" / "images"
SCRIPT: dict[str, Any] = runpy.run_path(str(FOLDER / "diagrams.py"))


@pytest.mark.parametrize("paper", SCRIPT["DRAWINGS"])
def test_the_file_is_what_the_script_draws(paper: str) -> None:
    drawn = SCRIPT["DRAWINGS"][paper]().svg()
    assert (FOLDER / f"{paper}.svg").read_text(encoding="utf-8") == drawn, "run python docs/images/diagrams.py"
