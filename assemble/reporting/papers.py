"""Find the papers by their tables files; define the order of scales and the project's folders."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ReportingError, nearest
from common.files import parse_yaml, parsing, read_text

#: Largest first. `single` takes about a day on one GPU, and only applies to tables that list it.
SCALES = ("paper", "single", "mini", "smoke")
#: Omit `smoke`: its numbers only show that a stage runs.
PROMOTED_SCALES = ("paper", "single", "mini")


@dataclass(frozen=True)
class Paper:
    """The block `paper:` at the head of a paper's `tables.yaml`.

    Args:
        short: the name in `make reproduce-<short>`.
        about: the method in a few words.
        checkpoints: size in GB of a checkpoint at the published sizes, by job, from `plan --estimate`.
        without_files: dotted configuration fields that need files, with values to train without these files.
            `{named: word, count: 3}` means the texts `word 0`, `word 1`, `word 2`.
        rounding: (standard deviation over roundings of one seed) / (standard deviation over seeds); used until records
            show the ratio.
    """

    name: str
    short: str
    title: str
    order: int
    recipe: str
    about: str = ""
    without_files: dict[str, Any] = field(default_factory=dict)
    checkpoints: dict[str, float] = field(default_factory=dict)
    rounding: float | None = None

    @property
    def root(self) -> Path:
        return project_root() / "papers" / self.name

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def readme(self) -> Path:
        return self.root / "README.md"


def project_root() -> Path:
    """Return the folder with `papers/` and `configs/`: `ASSEMBLE_ROOT`, else the checkout or installed package."""
    override = os.environ.get("ASSEMBLE_ROOT")
    return Path(override).expanduser().resolve() if override else Path(__file__).resolve().parents[2]


def checkout() -> Path | None:
    """Return the project's checkout, or None for an installed package."""
    root = project_root()
    return root if os.environ.get("ASSEMBLE_ROOT") or (root / "pyproject.toml").is_file() else None


def working_folder() -> Path:
    """Return the default parent of `runs/` and `data/`: the checkout, else the current folder."""
    return checkout() or Path.cwd()


def runs_root() -> Path:
    return working_folder() / "runs"


def existing_papers() -> list[Paper]:
    """List the papers that have a tables file, in order."""
    files = (project_root() / "papers").glob("*/tables.yaml")
    papers = [_headed(file, file.stat().st_mtime_ns) for file in files]
    return sorted(papers, key=lambda paper: (paper.order, paper.name))


def names_of_papers() -> str:
    return ", ".join(paper.short for paper in existing_papers())


@functools.lru_cache(maxsize=64)
def _headed(file: Path, changed: int) -> Paper:
    """Parse only the `paper:` block of a tables file, since parsing the whole file takes fifty times as long."""
    with parsing(file, ReportingError):
        block = re.search(r"^paper:.*\n(?:[ #].*\n|\n)*", read_text(file), re.MULTILINE)
        head = parse_yaml(block[0])["paper"] if block else {}
        return Paper(file.parent.name, **{**head, "order": int(head.get("order", 0))})


def papers_named(names: Sequence[str]) -> list[Paper]:
    """Find several papers. No name means all papers."""
    return [paper_named(name) for name in names] or existing_papers()


def paper_named(name: str) -> Paper:
    """Find a paper by its package name, short name or title."""
    papers = existing_papers()
    if not papers:
        raise ReportingError(
            f"{project_root()} has no papers/*/tables.yaml: the installation is incomplete, or ASSEMBLE_ROOT is wrong"
        )
    for paper in papers:
        if name.lower() in (paper.name, paper.short, paper.title.lower()):
            return paper
    raise ReportingError(f"unknown paper {name!r}: {nearest(name, [n for p in papers for n in (p.name, p.short)])}")
