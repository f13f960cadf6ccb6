"""Embed a run's pictures, clips and small tables, within a budget of bytes."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from assemble.reporting.records import Record
from common.files import open_inside

MEBIBYTE = 2**20
MAX_FILE_BYTES = 2 * MEBIBYTE
MAX_PAGE_BYTES = 32 * MEBIBYTE
MAX_TABLE_ROWS = 30
MIMES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp",
    ".mp4": "video/mp4", ".webm": "video/webm",
}  # fmt: skip
"""Files that a page can show, by suffix."""
_ROW, _ROW_CONTENT = ".row.png", ".row.json"


@dataclass
class Budget:
    """Count how many bytes of media, before encoding, still fit on the page."""

    left: int

    def refuse(self, size: int) -> str:
        """Reserve `size` bytes on the page and return an empty text. If they don't fit, return the reason."""
        if size > MAX_FILE_BYTES:
            return f"{size / MEBIBYTE:.1f} MiB, more than {MAX_FILE_BYTES / MEBIBYTE:.0f}"
        if size > self.left:
            return "the page is full"
        self.left -= size
        return ""


class Medium(NamedTuple):
    """An embedded picture or clip: `image` or `video`, its alternative text and its content."""

    kind: str
    text: str
    uri: str


class Sheet(NamedTuple):
    """A small table of texts. `more` is the number of rows that are not shown."""

    name: str
    header: list[str]
    rows: list[list[str]]
    more: int


@dataclass
class Gallery:
    """A run's media. `rows` maps titles to (column names, row). The omitted files are listed with the reasons."""

    media: list[Medium] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    rows: dict[str, tuple[tuple[str, ...], Medium]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def gallery(folder: Path, record: Record, budget: Budget, rows: bool = True) -> Gallery:
    """Collect a run's media within the budget. `rows` includes each `<title>.row.png` and its JSON file."""
    gallery = Gallery()
    for name in record.media:
        path = folder / name
        suffix = path.suffix.lower()
        if name.endswith(_ROW_CONTENT) or (name.endswith(_ROW) and not rows):
            continue
        if suffix not in (".csv", *MIMES):
            gallery.left_out.append(f"{path.name} (not a picture)")
            continue
        try:
            file = open_inside(folder, name)
        except (OSError, ValueError):  # An untrusted record must not show other files.
            gallery.left_out.append(f"{path.name} (not in the run's folder)")
            continue
        with file:
            if reason := budget.refuse(os.fstat(file.fileno()).st_size):
                gallery.left_out.append(f"{path.name} ({reason})")
            elif suffix == ".csv":
                lines = [*csv.reader(io.TextIOWrapper(file, "utf-8", "replace", newline=""))] or [[]]
                rest = max(len(lines) - 1 - MAX_TABLE_ROWS, 0)
                gallery.sheets.append(Sheet(path.name, lines[0], lines[1 : 1 + MAX_TABLE_ROWS], rest))
            elif name.endswith(_ROW):
                columns: list[str] = []
                with suppress(FileNotFoundError), open_inside(folder, name.removesuffix(_ROW) + _ROW_CONTENT) as texts:
                    columns = json.load(texts)
                gallery.rows[path.name.removesuffix(_ROW)] = tuple(map(str, columns)), _embedded(path, file, record)
            else:
                gallery.media.append(_embedded(path, file, record))
    return gallery


def _embedded(path: Path, file: IO[bytes], record: Record) -> Medium:
    suffix = path.suffix.lower()
    mime = MIMES[suffix]
    words = path.name.partition(".")[0].replace("_", " ")
    text = f"{words} of {record.stage}, {record.scale} scale, {record.draw}"
    return Medium(mime.partition("/")[0], text, f"data:{mime};base64,{base64.b64encode(file.read()).decode()}")
