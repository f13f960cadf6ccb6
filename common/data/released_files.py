"""What the recipes read beside data sets: released weights, vocabularies, dictionaries and lists.

Nothing is downloaded: like data sets, they are fetched by their user, who agrees to their terms (common/data/fetch.py).
"""

from __future__ import annotations

import fnmatch
import functools
from dataclasses import dataclass, replace
from pathlib import Path

from common.data import checksums
from common.errors import StageError
from common.files import read_yaml

TABLE = Path(__file__).with_name("released_files.yaml")


@dataclass(frozen=True)
class ReleasedFile:
    """A file, or a folder of files, that recipes name; `released_files.yaml` says what the fields are."""

    path: str
    title: str
    size: str = "unknown"
    license: str = "unknown"
    source: str = "the recipe's own file"
    contents: tuple[str, ...] = ()
    checksum: str = ""


@dataclass(frozen=True)
class FileStatus:
    """What is known about a released file.

    Args:
        file: the facts.
        path: where it was looked for.
        recipes: recipes that name it.
        present: whether it is there, with all that a folder must have.
        missing: what a folder lacks.
        checked: whether its checksum was looked at.
        problem: what is wrong with it; "" for nothing.
    """

    file: ReleasedFile
    path: Path
    recipes: tuple[str, ...]
    present: bool
    missing: tuple[str, ...] = ()
    checked: bool = False
    problem: str = ""


@functools.cache
def released_files() -> tuple[ReleasedFile, ...]:
    """The table."""
    return tuple(
        ReleasedFile(**{**entry, "contents": tuple(entry.get("contents", ()))})
        for entry in read_yaml(TABLE, StageError)
    )


def look_at(path: str, data: Path, recipes: tuple[str, ...] = (), verify: bool = False) -> FileStatus:
    """Look for a file that recipes name.

    Args:
        path: relative to `data`.
        data: folder of the data sets.
        recipes: recipes that name it.
        verify: also compare it with its published checksum.
    """
    known = (replace(file, path=path) for file in released_files() if fnmatch.fnmatchcase(path, file.path))
    file = next(known, ReleasedFile(path, Path(path).name))
    place = data / path
    missing = tuple(
        names.replace("|", " or ")
        for names in file.contents
        if not any((place / name).is_file() for name in names.split("|"))
    )
    status = FileStatus(file, place, recipes, place.exists() and not missing, missing)
    if not (verify and file.checksum and place.is_file()):
        return status
    return replace(status, checked=True, problem=checksums.problem(place, file.checksum) or "")
