"""What a run left to look at, embedded: pictures, clips and small tables, within a budget of bytes."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.reporting.records import Record, warn_of

MEBIBYTE = 2**20
MAX_FILE_BYTES = 2 * MEBIBYTE
MAX_PAGE_BYTES = 32 * MEBIBYTE
MAX_FILES_PER_RUN = 24
MAX_TABLE_ROWS = 30
_IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}
_VIDEOS = {".mp4": "video/mp4", ".webm": "video/webm"}
MIMES = {**_IMAGES, **_VIDEOS}
"""What a page can show, by the ending of the file."""
_ROW, _ROW_CONTENT = ".row.png", ".row.json"


@dataclass
class Budget:
    """How many bytes of media a page may still take; the files themselves, before they are encoded as text."""

    left: int = MAX_PAGE_BYTES

    def refuse(self, path: Path) -> str:
        """Why a file does not fit, or an empty text; one that fits is counted."""
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

    Args:
        kind: `image` or `video`.
        name: name of its file.
        text: what it shows, for people who cannot see it.
        uri: its content.
    """

    kind: str
    name: str
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
    """What one stage left to look at, and what was left out, with the reasons."""

    media: list[Medium] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """Rows of pictures of several stages that show the same things in the same order, one row a stage."""

    title: str
    scale: str
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[str, Medium]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def gallery(folder: Path, record: Record, budget: Budget) -> Gallery:
    """Everything in the media of a run that a page can show, except what `comparisons` takes.

    Args:
        folder: the run's folder.
        record: its record, which names the files.
        budget: what the page can still take.
    """
    found = Gallery()
    for name in record.media:
        path = folder / name
        suffix = path.suffix.lower()
        if name.endswith((_ROW, _ROW_CONTENT)):
            continue
        if not is_own(path, folder):
            found.left_out.append(f"{path.name} (not in the run's folder)")
        elif suffix == ".csv":
            try:
                found.sheets.append(read_sheet(path))
            except (csv.Error, OSError) as error:
                found.left_out.append(f"{path.name} (cannot be read: {error})")
        elif suffix not in _IMAGES | _VIDEOS:
            found.left_out.append(f"{path.name} (no picture)")
        elif len(found.media) == MAX_FILES_PER_RUN:
            found.left_out.append(f"{path.name} (more than {MAX_FILES_PER_RUN} files)")
        elif reason := budget.refuse(path):
            found.left_out.append(f"{path.name} ({reason})")
        else:
            found.media.append(_embedded(path, record))
    return found


def comparisons(records: Sequence[Record], runs: Path, order: Sequence[str], budget: Budget) -> list[Comparison]:
    """Pictures named `<title>.row.png` of all stages below each other, in the order of the paper's stages.

    A file `<title>.row.json` beside them says what is shown, from left to right. Only stages that show the same are
    put together; of a stage with several seeds the first.

    Args:
        records: records of one paper.
        runs: folder of runs.
        order: names of the paper's stages.
        budget: what the page can still take.
    """
    found: dict[tuple[str, str, str], list[tuple[str, Path, Record]]] = {}
    known = {stage: place for place, stage in enumerate(order)}
    for record in sorted(records, key=lambda r: (known.get(r.stage.partition("@")[0], len(known)), r.stage, r.draw)):
        folder = record.folder(runs)
        for name in record.media:
            path = folder / name
            if not name.endswith(_ROW) or not is_own(path, folder):
                continue
            beside = path.with_suffix(".json")
            text = _columns(beside) if is_own(beside, folder) else "[]"
            rows = found.setdefault((record.scale, path.name.removesuffix(_ROW), text), [])
            if record.stage not in [stage for stage, _, _ in rows]:
                rows.append((record.stage, path, record))
    shown = []
    for (scale, title, text), rows in found.items():
        comparison = Comparison(title, scale, json.loads(text))
        for stage, path, record in rows:
            if reason := budget.refuse(path):
                comparison.left_out.append(f"{stage} ({reason})")
            else:
                comparison.rows.append((stage, _embedded(path, record)))
        shown.append(comparison)
    return shown


def is_own(path: Path, folder: Path) -> bool:
    """Whether a file lies in a run's folder, links followed: a record of others must not show what lies elsewhere."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _columns(path: Path) -> str:
    """What the pictures of a row show, as JSON text; an empty list where the file is damaged, which is said."""
    try:
        text = path.read_text(encoding="utf-8")
        if isinstance(json.loads(text), list):
            return text
        problem = "expected a list"
    except (ValueError, OSError, RecursionError) as error:
        problem = str(error)
    warn_of(f"{path} does not say what the pictures show ({problem}); run the stage again")
    return "[]"


def _embedded(path: Path, record: Record) -> Medium:
    suffix = path.suffix.lower()
    kind, mime = ("image", _IMAGES[suffix]) if suffix in _IMAGES else ("video", _VIDEOS[suffix])
    words = path.name.partition(".")[0].replace("_", " ")
    text = f"{words} of {record.stage}, {record.scale} scale, {record.draw}"
    return Medium(kind, path.name, text, f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}")


def read_sheet(path: Path) -> Sheet:
    """The first rows of a table of texts."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        header, *rows = [*csv.reader(file)] or [[]]
    return Sheet(path.name, header, rows[:MAX_TABLE_ROWS], max(len(rows) - MAX_TABLE_ROWS, 0))
