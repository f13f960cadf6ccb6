"""The papers, found by their tables files; the order of scales; where a project's folders lie."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import ReportingError, nearest
from common.files import named, parse_yaml

#: From the largest to the smallest; `single` is one card for about a day, for the tables that list it.
SCALES = ("paper", "single", "mini", "smoke")
#: Smoke numbers mean nothing: they only show that a stage runs.
PROMOTED_SCALES = ("paper", "single", "mini")


@dataclass(frozen=True)
class Paper:
    """One paper of the suite, as the block `paper:` at the head of its `tables.yaml` says it.

    Args:
        name: package under `papers/` and folder under `configs/`.
        short: the name that `make reproduce-<short>` takes.
        title: how tables and pages call it.
        order: its place among the papers.
        recipe: its main recipe, which is measured where none is named.
        without_files: dotted fields of the configuration that name files, and what stands there when training is tried
            without any; `{named: word, count: 3}` stands for the texts `word 0`, `word 1`, `word 2`.
    """

    name: str
    short: str
    title: str
    order: int
    recipe: str
    without_files: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def root(self) -> Path:
        """Folder of the package."""
        return project_root() / "papers" / self.name

    @property
    def tables_file(self) -> Path:
        """The file that lists the published tables."""
        return self.root / "tables.yaml"

    @property
    def results(self) -> Path:
        """Folder of the promoted records."""
        return self.root / "results"

    @property
    def readme(self) -> Path:
        """The paper card that holds the generated tables."""
        return self.root / "README.md"


def project_root() -> Path:
    """Folder that holds `papers/` and `configs/`: a checkout, or where the package was installed.

    `ASSEMBLE_ROOT` overrides it.
    """
    override = os.environ.get("ASSEMBLE_ROOT")
    return Path(override).expanduser().resolve() if override else Path(__file__).resolve().parents[2]


def checkout() -> Path | None:
    """The project's folder where it is a checkout or named by ``ASSEMBLE_ROOT``; None for an installed package."""
    root = project_root()
    return root if os.environ.get("ASSEMBLE_ROOT") or (root / "pyproject.toml").is_file() else None


def needed_checkout(what: str) -> Path:
    """The checkout, for what writes into it.

    Raises:
        ReportingError: the package was installed without one.
    """
    root = checkout()
    if root is None:
        raise ReportingError(
            f"{what}, and {project_root()} is an installed package: run it in a clone, or name one in ASSEMBLE_ROOT"
        )
    return root


def working_folder() -> Path:
    """Where ``runs/`` and ``data/`` lie if nothing else is said: the checkout, else the current folder."""
    return checkout() or Path.cwd()


def runs_root() -> Path:
    """Folder of the untracked runs."""
    return working_folder() / "runs"


def existing_papers() -> list[Paper]:
    """The papers that have a tables file, in the suite's order.

    Raises:
        ReportingError: the head of one of these files is wrong; the message names the file and the field.
    """
    files = (project_root() / "papers").glob("*/tables.yaml")
    return sorted(
        (_headed(file, file.stat().st_mtime_ns) for file in files), key=lambda paper: (paper.order, paper.name)
    )


def names_of_papers() -> str:
    """The short names, for help and messages."""
    return ", ".join(paper.short for paper in existing_papers())


def example_stage() -> str:
    """A paper and its main recipe as the command line takes them, for help and messages."""
    return next((f"{paper.short}/{paper.recipe}" for paper in existing_papers()), "PAPER/RECIPE")


@functools.lru_cache(maxsize=64)
def _headed(file: Path, changed: int) -> Paper:
    """Read the head of a tables file.

    The block alone is parsed: the whole file takes fifty times as long, and every command asks for the papers.
    """
    try:
        with named(file):
            text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ReportingError(f"{file} cannot be read as text: {error}") from None
    block = re.search(r"^paper:.*\n(?:[ #].*\n|\n)*", text, re.MULTILINE)
    try:
        head = parse_yaml(block[0])["paper"] if block else None
    except ValueError as error:
        raise ReportingError(f"{file}: paper: {error}") from None
    valid = {one.name: one for one in fields(Paper) if one.name != "name"}
    if not isinstance(head, dict):
        raise ReportingError(f"{file}: paper: expected a block with {', '.join(valid)}")
    for key in head:
        if key not in valid:
            raise ReportingError(f"{file}: paper: unknown key {key!r}: {nearest(str(key), valid)}")
    kinds = {"order": (int, "a whole number"), "without_files": (dict, "a mapping")}
    for key in valid:
        kind, told = kinds.get(key, (str, "text"))
        if key == "without_files" and key not in head:
            continue
        if not isinstance(head.get(key), kind):
            wrong = f"expected {told}, got {head[key]!r}" if key in head else "missing"
            raise ReportingError(f"{file}: paper.{key}: {wrong}")
    return Paper(file.parent.name, **head)


def paper_named(name: str) -> Paper:
    """Find a paper by its package name or its short name.

    Raises:
        ReportingError: for an unknown name, with the nearest valid one.
    """
    known = existing_papers()
    if not known:
        raise ReportingError(
            f"{project_root()} holds no papers/*/tables.yaml: the installation is incomplete, or ASSEMBLE_ROOT names "
            "another folder"
        )
    for paper in known:
        if name.lower() in (paper.name, paper.short, paper.title.lower()):
            return paper
    raise ReportingError(f"unknown paper {name!r}: {nearest(name, [n for p in known for n in (p.name, p.short)])}")


def check_scale(scale: str) -> str:
    """Return the scale when it is one.

    Raises:
        ReportingError: for an unknown scale, with the nearest valid one.
    """
    if scale not in SCALES:
        raise ReportingError(f"unknown scale {scale!r}: {nearest(scale, SCALES)}")
    return scale
