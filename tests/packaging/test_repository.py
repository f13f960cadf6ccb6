"""The files of containers: they parse, what they name is here, they install the lock, and nobody is root in them."""

from __future__ import annotations

import re
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


def test_the_image_is_of_a_python_that_the_project_takes() -> None:
    found = instructions()
    assert found[0][0] == "FROM"
    version = re.fullmatch(r"python:(3\.\d+)-slim", found[0][1])
    assert version
    assert version[1] in ("3.11", "3.12", "3.13")
    known = {"FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "CMD"}
    assert {name for name, _ in found} <= known
    assert all("://" not in rest for _, rest in found)


def test_what_is_copied_is_here_and_the_lock_is_what_is_installed() -> None:
    found = instructions()
    copied = [rest.split()[1:-1] for name, rest in found if name == "COPY"]
    assert copied == [["requirements.lock"], ["."]]
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    (sync,) = (rest for name, rest in found if name == "RUN" and "uv pip sync" in rest)
    assert "--require-hashes requirements.lock" in sync
    assert any(name == "RUN" and rest.endswith("make setup") for name, rest in found)


def test_nobody_is_root() -> None:
    found = instructions()
    (user,) = (rest for name, rest in found if name == "USER")
    assert user != "root"
    place = [name for name, _ in found].index("USER")
    assert any(f" {user}" in rest and "useradd" in rest for name, rest in found[:place] if name == "RUN")
    assert all(f"--chown={user} " in rest for name, rest in found if name == "COPY")
    assert all("apt-get" not in rest for _, rest in found[place:])
    home = next(rest for name, rest in found if name == "WORKDIR")
    assert home.startswith(f"/home/{user}/")
    assert next(rest for name, rest in found if name == "ENV").startswith(f'PATH="{home}/.venv/bin:')


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
