"""Released weights, vocabularies, dictionaries and lists that the recipes read; the user downloads them."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.data import checksums
from common.errors import StageError
from common.files import read_yaml

TABLE = Path(__file__).with_name("released_files.yaml")


@dataclass(frozen=True)
class ReleasedFile:
    """A file or folder that recipes name; `released_files.yaml` explains the fields."""

    path: str
    title: str
    size: str = "unknown"
    license: str = "unknown"
    source: str = "the recipe's own file"
    contents: Sequence[str] = ()
    checksum: str = ""


@dataclass(frozen=True)
class FileStatus:
    """Status of a released file: what a folder lacks, whether the checksum was compared, and what is wrong."""

    file: ReleasedFile
    path: Path
    recipes: tuple[str, ...]
    present: bool
    missing: tuple[str, ...] = ()
    checked: bool = False
    problem: str = ""


@functools.cache
def released_files() -> tuple[ReleasedFile, ...]:
    return tuple(ReleasedFile(**entry) for entry in read_yaml(TABLE, StageError))


def look_at(path: str, data: Path, recipes: tuple[str, ...] = (), verify: bool = False) -> FileStatus:
    """Look for a file (relative to `data`) that recipes name; `verify` also compares its published checksum."""
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
