"""Released weights, vocabularies, dictionaries and lists that the recipes read; the user downloads them."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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


@dataclass(frozen=True)
class FileStatus:
    """Status of a released file; `missing` lists what a folder lacks."""

    file: ReleasedFile
    path: Path
    recipes: tuple[str, ...]
    present: bool
    missing: tuple[str, ...] = ()


@functools.cache
def released_files() -> tuple[ReleasedFile, ...]:
    return tuple(ReleasedFile(**entry) for entry in read_yaml(TABLE, StageError))


def look_at(path: str, data: Path, recipes: tuple[str, ...] = ()) -> FileStatus:
    """Look for a file (relative to `data`) that recipes name."""
    described = (replace(file, path=path) for file in released_files() if fnmatch.fnmatchcase(path, file.path))
    file = next(described, ReleasedFile(path, Path(path).name))
    place = data / path
    missing = tuple(
        names.replace("|", " or ")
        for names in file.contents
        if not any((place / name).is_file() for name in names.split("|"))
    )
    return FileStatus(file, place, recipes, place.exists() and not missing, missing)
