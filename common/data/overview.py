"""Overview of a paper's data sets, weights, vocabularies and lists. This module downloads nothing."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from common import files
from common.data.datasets.base import DatasetStatus, MediaDataset
from common.errors import StageError, printable
from common.files import read_yaml


def report(datasets: Sequence[MediaDataset], console: Console | None = None) -> list[DatasetStatus]:
    console = console or files.console()
    statuses, printed = [], set()
    for dataset in datasets:
        with console.status(f"Checking {dataset.title}"):
            statuses.append(dataset.status())
        entry = (dataset.full_title, _state(statuses[-1]), _details(statuses[-1]))
        # Recipes may read the same files with different options.
        if str(entry) not in printed:
            print_entry(console, *entry)
        printed.add(str(entry))
    return statuses


def report_files(statuses: Sequence[FileStatus], console: Console | None = None) -> None:
    console = console or files.console()
    if statuses:
        console.print(Text("Weights and other files", style="italic"))
    for status in statuses:
        file, recipes = status.file, status.recipes
        state = Text("incomplete" if status.path.exists() else "missing", style="red")
        if status.present:
            state = Text("present", style="green")
        names = ", ".join(recipes[:2]) + (f" and {len(recipes) - 2} more" if len(recipes) > 2 else "")
        lines = [f"Path: {status.path}", f"Size: {file.size}", f"License: {file.license}", f"Read by: {names}"]
        lines += [f"Missing: {', '.join(status.missing)}"] if status.missing else []
        if not status.present:
            lines.append(f"Get it from: {file.source.replace('{path}', str(status.path))}")
        print_entry(console, file.title, state, lines)


def print_entry(console: Console, title: str, state: Text, lines: Sequence[str]) -> None:
    console.print(Text.assemble((title, "bold"), ": ", state))
    # Print as text, not markup, because paths may contain square brackets.
    console.print(Text(printable("\n".join(f"  {line}" for line in lines))))


def _state(status: DatasetStatus) -> Text:
    if status.present:
        return Text("present", style="yellow" if status.notes else "green")
    return Text("incomplete" if status.counts else "missing", style="yellow" if status.counts else "red")


def _details(status: DatasetStatus) -> list[str]:
    counts = ", ".join(f"{part} {count:,}" for part, count in status.counts.items())
    dataset = status.dataset
    lines = [f"Path: {dataset.root}"]
    lines += [f"{dataset.unit.capitalize()}: {counts}"] if counts else []
    lines += [f"Layout: {status.layout}"] if status.layout else []
    lines += [f"Size: {dataset.size}", f"License: {dataset.license}"]
    if not status.present:
        lines += "".join(status.problems[:1]).splitlines()[:1]
        lines += ["Expected:", *(f"  {line}" for line in dataset.expected_layout.splitlines())]
        lines += [f"  {dataset.further_layout}"] if dataset.further_layout else []
    return [*lines, f"Get it from: {dataset.source}", *(f"Note: {note}" for note in status.notes)]


TABLE = Path(__file__).with_name("released_files.yaml")


@dataclass(frozen=True)
class ReleasedFile:
    """A file or folder that recipes refer to; `released_files.yaml` explains the fields."""

    path: str
    title: str
    size: str = "unknown"
    license: str = "unknown"
    source: str = "the recipe's own file"
    contents: Sequence[str] = ()


@dataclass(frozen=True)
class FileStatus:
    """Status of a released file or folder. `missing` lists files that the folder lacks."""

    file: ReleasedFile
    path: Path
    recipes: tuple[str, ...]
    present: bool
    missing: tuple[str, ...] = ()


@functools.cache
def released_files() -> tuple[ReleasedFile, ...]:
    return tuple(ReleasedFile(**entry) for entry in read_yaml(TABLE, StageError))


def look_at(path: str, data: Path, recipes: tuple[str, ...] = ()) -> FileStatus:
    """Check whether a file of the recipes exists; `path` is relative to `data`."""
    described = (replace(file, path=path) for file in released_files() if fnmatch.fnmatchcase(path, file.path))
    file = next(described, ReleasedFile(path, Path(path).name))
    place = data / path
    missing = tuple(
        names.replace("|", " or ")
        for names in file.contents
        if not any((place / name).is_file() for name in names.split("|"))
    )
    return FileStatus(file, place, recipes, place.exists() and not missing, missing)
