"""A run's pictures, clips and small tables, embedded within a budget of bytes."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from common.reporting.records import Record

MEBIBYTE = 2**20
MAX_FILE_BYTES = 2 * MEBIBYTE
MAX_PAGE_BYTES = 32 * MEBIBYTE
MAX_FILES_PER_RUN = 24
MAX_TABLE_ROWS = 30
MIMES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp",
    ".mp4": "video/mp4", ".webm": "video/webm",
}  # fmt: skip
"""What a page can show, by the ending of the file."""
_ROW, _ROW_CONTENT = ".row.png", ".row.json"


@dataclass
class Budget:
    """How many bytes of media a page may still take, before encoding."""

    left: int = MAX_PAGE_BYTES

    def refuse(self, path: Path) -> str:
        """Why a file does not fit, or an empty string; counts one that fits."""
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            return f"{size / MEBIBYTE:.1f} MiB, more than {MAX_FILE_BYTES / MEBIBYTE:.0f}"
        if size > self.left:
            return "the page is full"
        self.left -= size
        return ""


@dataclass(frozen=True)
class Medium:
    """An embedded picture or clip.

    Attributes:
        kind: `image` or `video`.
        text: alternative text.
        uri: its content.
    """

    kind: str
    text: str
    uri: str


@dataclass(frozen=True)
class Sheet:
    """A small table of texts; `more` rows are not shown."""

    name: str
    header: list[str]
    rows: list[list[str]]
    more: int = 0


@dataclass
class Gallery:
    """A run's media, and what was left out and why; `rows` maps a title to the row and its columns' names."""

    media: list[Medium] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    rows: dict[str, tuple[list[str], Medium]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """Rows of pictures of several stages that show the same things in the same order, one row per stage."""

    title: str
    scale: str
    columns: list[str]
    rows: list[tuple[str, Medium]] = field(default_factory=list)


def gallery(folder: Path, record: Record, budget: Budget, rows: bool = True) -> Gallery:
    """A run's media within the budget; with `rows` also `<title>.row.png`, which `<title>.row.json` describes."""
    found = Gallery()
    for name in record.media:
        path = folder / name
        suffix = path.suffix.lower()
        if name.endswith(_ROW_CONTENT) or (name.endswith(_ROW) and not rows):
            continue
        if not is_own(path, folder):
            found.left_out.append(f"{path.name} (not in the run's folder)")
        elif suffix == ".csv":
            found.sheets.append(read_sheet(path))
        elif suffix not in MIMES:
            found.left_out.append(f"{path.name} (no picture)")
        elif len(found.media) == MAX_FILES_PER_RUN:
            found.left_out.append(f"{path.name} (more than {MAX_FILES_PER_RUN} files)")
        elif reason := budget.refuse(path):
            found.left_out.append(f"{path.name} ({reason})")
        elif name.endswith(_ROW):
            described = path.with_suffix(".json")
            columns = json.loads(described.read_text(encoding="utf-8")) if is_own(described, folder) else []
            found.rows[path.name.removesuffix(_ROW)] = list(map(str, columns)), _embedded(path, record)
        else:
            found.media.append(_embedded(path, record))
    return found


def comparisons(galleries: Iterable[tuple[str, str, Gallery]]) -> list[Comparison]:
    """Rows of pictures below each other where they show the same, from (scale, stage, gallery) in order."""
    found: dict[tuple[str, str, tuple[str, ...]], Comparison] = {}
    for scale, stage, one in galleries:
        for title, (columns, row) in one.rows.items():
            together = found.setdefault((scale, title, tuple(columns)), Comparison(title, scale, columns))
            together.rows.append((stage, row))
    return list(found.values())


def is_own(path: Path, folder: Path) -> bool:
    """Whether a file is inside a run's folder after following links; an untrusted record must not show other files."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _embedded(path: Path, record: Record) -> Medium:
    suffix = path.suffix.lower()
    mime = MIMES[suffix]
    words = path.name.partition(".")[0].replace("_", " ")
    text = f"{words} of {record.stage}, {record.scale} scale, {record.draw}"
    return Medium(mime.partition("/")[0], text, f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}")


def read_sheet(path: Path) -> Sheet:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        header, *rows = [*csv.reader(file)] or [[]]
    return Sheet(path.name, header, rows[:MAX_TABLE_ROWS], max(len(rows) - MAX_TABLE_ROWS, 0))
