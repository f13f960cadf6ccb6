"""The image installs the lock for a user; the drawings are those of their script."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

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


@pytest.mark.parametrize("paper", SCRIPT["DRAWINGS"])
def test_the_file_is_what_the_script_draws(paper: str) -> None:
    drawn = SCRIPT["DRAWINGS"][paper]().svg()
    assert (FOLDER / f"{paper}.svg").read_text(encoding="utf-8") == drawn, "run python docs/images/diagrams.py"
