"""The papers: names, short names and folders. The one place that knows them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import ReportingError, nearest

SCALES = ("paper", "mini", "smoke")


@dataclass(frozen=True)
class Paper:
    """One paper of the suite.

    Args:
        name: package under ``papers/`` and folder under ``configs/``.
        short: the name that ``make reproduce-<short>`` takes.
        title: how tables and pages call it.
    """

    name: str
    short: str
    title: str

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

    @property
    def exists(self) -> bool:
        """Whether the paper is built, that is, has a tables file."""
        return self.tables_file.is_file()


PAPERS = (
    Paper("avid_cma", "avid", "AVID-CMA"),
    Paper("xmc_gan", "xmcgan", "XMC-GAN"),
    Paper("m3p", "m3p", "M3P"),
    Paper("vx2text", "vx2text", "Vx2Text"),
    Paper("mct", "mct", "MCT"),
)


def project_root() -> Path:
    """Folder that holds ``papers/``, ``configs/`` and ``runs/``; ``ASSEMBLE_ROOT`` overrides it."""
    override = os.environ.get("ASSEMBLE_ROOT")
    return Path(override).expanduser().resolve() if override else Path(__file__).resolve().parents[2]


def runs_root() -> Path:
    """Folder of the untracked runs."""
    return project_root() / "runs"


def paper_named(name: str) -> Paper:
    """Find a paper by its package name or its short name.

    Raises:
        ReportingError: for an unknown name, with the nearest valid one.
    """
    for paper in PAPERS:
        if name in (paper.name, paper.short):
            return paper
    valid = [n for p in PAPERS for n in (p.name, p.short)]
    raise ReportingError(f"unknown paper {name!r}: {nearest(name, valid)}")


def existing_papers() -> list[Paper]:
    """The papers that are built (have a tables file), in the suite's order."""
    return [paper for paper in PAPERS if paper.exists]


def check_scale(scale: str) -> str:
    """Return the scale when it is one.

    Raises:
        ReportingError: for an unknown scale, with the nearest valid one.
    """
    if scale not in SCALES:
        raise ReportingError(f"unknown scale {scale!r}: {nearest(scale, SCALES)}")
    return scale
