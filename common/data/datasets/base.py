"""Base of all data sets: checks arguments, caches the listing, reports the status, and explains a missing folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from common.data.listing import NUMBERS, DatasetMissing, Listing, file_names, spread
from common.data.sequences import Columns, Texts, cached_columns
from common.files import named, read_text, stamp_of

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".flv"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".m4a"})
Record = TypeVar("Record")
# Cache listings from this size on; a smaller folder is faster to read again.
INDEX_FROM = 20_000
# A listing names at most this many missing clips.
NAMED_MISSING = 20
# A status looks at the sizes of at most this many files of a split.
LOOKED_AT = 1000


@dataclass
class Scan:
    """Result of reading a folder, before it becomes a :class:`Listing`.

    Args:
        watched: folders and list files. A change of one invalidates the cached listing.
        missing_names: items that the official lists name, but the folder lacks.
        rows: name, numbers (see `NUMBERS`) and sound file of each item, in any order; see :meth:`add`.
        in_order: keep the order of rows instead of sorting them by name.
    """

    classes: tuple[str, ...]
    layout: str
    watched: list[Path] = field(default_factory=list)
    missing_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[str, tuple[float, ...], str]] = field(default_factory=list)
    in_order: bool = False

    def add(
        self, name: str | None, listed: str = "", *, label: int = -1, sound_label: int = -1, fold: int = 0,
        start: float = math.nan, end: float = math.nan, sound: str = "",
    ) -> None:  # fmt: skip
        """Add a file; `name` is relative to the root. If `name` is None, count the item called `listed` as missing."""
        if name is None:
            self.missing_names.append(listed)
        else:
            self.rows.append((name, (label, sound_label, fold, start, end), sound))


class MediaDataset(ABC):
    """A data set: a folder of media files with labels. The constructor reads nothing."""

    name: ClassVar[str]
    title: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    split_aliases: ClassVar[Mapping[str, str]] = {}
    num_folds: ClassVar[int] = 0
    fold_needed: ClassVar[bool] = False
    num_classes: ClassVar[int | None] = 0
    published_counts: ClassVar[Mapping[str, int]] = {}
    count_tolerance: ClassVar[float] = 0.0
    optional_splits: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[tuple[str, ...]] = ("video",)
    expected_layout: ClassVar[str]
    #: More of the expected layout, shown only in the overview.
    further_layout: ClassVar[str] = ""
    size: ClassVar[str]
    license: ClassVar[str]
    source: ClassVar[str]
    #: Leave out clips whose picture and sound overlap for no longer than this; None keeps all.
    common_seconds: float | None = None

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()

    # ------------------------------------------------------------------------------------------------ listing
    def listing(self, split: str, fold: int | None = None) -> Listing:
        """Return the clips or images of a split (or its alias) and fold (from 1), sorted by file name."""
        listing = self._all(split, fold)
        if self.common_seconds is None:
            return listing
        from common.data.durations import long_enough  # imports a decoder, which planning doesn't need

        return long_enough(listing, self.common_seconds)

    def _all(self, split: str, fold: int | None) -> Listing:
        """Return all clips of a split, also those without sound. Use the cached listing if no file has changed."""
        split, fold = self._checked(split, fold)

        def fresh() -> tuple[Columns, list[Path]]:
            listing, watched = self._fresh(split, fold)
            return listing.columns(), watched if len(listing) >= INDEX_FROM else []

        return Listing.of_columns(cached_columns(self.index_name(split, fold), fresh))

    def index_name(self, split: str, fold: int | None = None) -> str:
        """Return the name of a split's listing in the cache."""
        key = f"{os.path.abspath(self.root)}\0{sorted(self._options().items())}"
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return f"{self.name}-{digest}-{split if fold is None else f'{split}-fold{fold}'}"

    @property
    def unit(self) -> str:
        return "images" if self.streams == ("image",) else "clips"

    @property
    def full_title(self) -> str:
        """Return the title. Subclasses add the part of the data that the arguments select."""
        return self.title

    def published_count(self, split: str, fold: int | None = None) -> int | None:
        """Return the published number of items of a split; None = unknown."""
        return self.published_counts.get(_part(split, fold), self.published_counts.get(split))

    def published_classes(self) -> int | None:
        return self.num_classes

    def parts(self) -> list[tuple[str, int | None]]:
        """Return each (split, fold) that can be listed. If there is a split "all", return only that."""
        if "all" in self.splits:
            return [("all", None)]
        if not self.fold_needed:
            return [(split, None) for split in self.splits]
        return [(split, fold) for fold in range(1, self.num_folds + 1) for split in self.splits]

    def require_folder(self) -> None:
        if not self.root.is_dir():
            raise self._lacks(self.root)

    def _fresh(self, split: str, fold: int | None) -> tuple[Listing, list[Path]]:
        self.require_folder()
        scan = self._scan(split, fold)
        if not scan.rows:
            raise self._lacks(self.root, f"none of the {self.unit} of split {split!r} was found ({scan.layout})")
        if not scan.in_order:
            scan.rows.sort(key=lambda row: row[0])
        names, numbers, sounds = zip(*scan.rows)
        missing = sorted(scan.missing_names)
        listing = Listing(
            self.name,
            f"{split if fold is None else f'{split}, fold {fold}'}; {scan.layout}",
            self.root,
            scan.classes,
            file_names(names),
            np.array(list(numbers), NUMBERS),
            Texts(sounds),
            len(missing),
            tuple(missing[:NAMED_MISSING]),
            scan.layout,
            tuple(scan.notes),
        )
        return listing, [self.root, *scan.watched]

    @abstractmethod
    def _scan(self, split: str, fold: int | None) -> Scan:
        """Read the folder. The caller has checked root, split and fold."""

    def _options(self) -> dict[str, object]:
        """Return all arguments except the root that change the listing. They become part of the cache key."""
        return {}

    def _checked(self, split: str, fold: int | None) -> tuple[str, int | None]:
        split = self.split_aliases.get(split, split)
        if split not in self.splits:
            valid = ", ".join([*self.splits, *(f"{alias} (= {real})" for alias, real in self.split_aliases.items())])
            raise ValueError(f"{self.title} has no split {split!r}; it has: {valid}")
        if fold is not None:
            if not self.num_folds:
                raise ValueError(f"{self.title} has no folds; leave fold empty instead of {fold!r}")
            if not 1 <= fold <= self.num_folds:
                raise ValueError(f"{self.title} has the folds 1 to {self.num_folds}, not {fold!r}")
        elif self.fold_needed:
            raise ValueError(f"{self.title} is split by folds: give fold = 1 to {self.num_folds} (--data.fold)")
        return split, fold

    def _one_of(self, *names: str, reason: str = "") -> Path:
        """Return the first of these files or folders (relative to the root) that exists."""
        path = first_of(self.root, names)
        if path is None:
            raise self._lacks(self.root / names[0], reason)
        return path

    # ------------------------------------------------------------------------------------------------ errors, status
    def _lacks(self, path: Path, reason: str = "") -> DatasetMissing:
        layout = "\n".join(f"    {line}" for line in self.expected_layout.splitlines())
        return DatasetMissing(
            f"{self.full_title}: {reason + '; looked in' if reason else 'nothing at'} {path}\n"
            f"  Expected layout:\n{layout}\n"
            f"  Size: {self.size}. License: {self.license}.\n"
            f"  Get it from: {self.source}.\n"
            "  `make data-<paper>` prints what was found and what is missing."
        )

    def status(self) -> DatasetStatus:
        """Report which files of every split exist and which are missing. Use cached listings if no file has changed.

        The status counts clips without sound, because it opens no files.
        """
        counts: dict[str, int] = {}
        notes: list[str] = []
        unlike: dict[str, str] = {}
        layouts: list[str] = []
        problems: list[str] = []
        for split, fold in self.parts():
            part = _part(split, fold)
            try:
                listing = self._all(split, fold)
            except DatasetMissing as error:
                if split not in self.optional_splits or not self.root.is_dir():
                    problems.append(str(error))
                continue
            except (ValueError, RuntimeError) as error:  # a damaged list, or too many broken files
                problems.append(str(error))
                continue
            paths = [listing[row].path for row in spread(len(listing), LOOKED_AT)]
            if broken := [path.name for path in paths if not (stamp_of(path)[-1] or path.is_dir())]:
                lacking = f"{len(broken):,} of {len(paths):,} {self.unit} that were looked at are empty or broken links"
                notes.append(f"{part}: {lacking}, such as {', '.join(broken[:2])}")
                if len(broken) == len(paths):
                    problems.append(f"{self.full_title}: {notes.pop()}")
                    continue
            counts[part] = len(listing)
            layouts.append(listing.layout)
            if listing.missing:
                example = ", ".join(listing.missing_names[:2])
                notes.append(f"{part}: {listing.missing:,} listed {self.unit} are missing, such as {example}")
            if published := self._unlike_published(len(listing), self.published_count(split, fold)):
                unlike[part] = published
                notes.append(f"{part}: {len(listing):,} {self.unit}, {published}")
            if self.published_classes() not in (None, len(listing.classes)):
                notes.append(f"{part}: {len(listing.classes)} classes, published {self.published_classes()}")
            notes += [f"{part}: {note}" for note in listing.notes]
        layout = "; ".join(dict.fromkeys(layouts))
        return DatasetStatus(self, layout, counts, problems, tuple(dict.fromkeys(notes)), unlike)

    def _unlike_published(self, count: int, published: int | None) -> str:
        """Return the published number of items in words if `count` differs from it, else an empty text."""
        if published is None or abs(count - published) <= self.count_tolerance * published:
            return ""
        return f"published {'about ' if self.count_tolerance else ''}{published:,}"


@dataclass(frozen=True)
class DatasetStatus:
    """Status of a data set's folder, for the overview of ``make data-<paper>``.

    `counts` holds the number of items of each available split and fold. `unlike` holds the published number, in words,
    where it differs.
    """

    dataset: MediaDataset
    layout: str
    counts: Mapping[str, int]
    problems: Sequence[str] = ()
    notes: tuple[str, ...] = ()
    unlike: Mapping[str, str] = field(default_factory=dict)

    @property
    def present(self) -> bool:
        """Whether all required splits are present."""
        return not self.problems and bool(self.counts)


def _part(split: str, fold: int | None) -> str:
    return split if fold is None else f"{split} {fold}"


# ---------------------------------------------------------------------------------------------------- reading folders
def first_of(root: Path, names: Iterable[str]) -> Path | None:
    """Return the first file or folder of `names` that exists in the root; "." is the root itself."""
    return next((path for name in names if (path := root / name).exists()), None)


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of a folder's subfolders and files, without hidden ones."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as listed:
        for entry in listed:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def walk(folder: Path, suffixes: frozenset[str] | None, watched: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield all files below a folder as (name relative to the folder, stem), depth first, sorted.

    `suffixes` are lower case; None = all files. Visited folders are added to `watched`.
    """
    pending = [""]
    seen: set[tuple[int, int]] = set()
    while pending:
        prefix = pending.pop()
        current = folder / prefix if prefix else folder
        identity = current.stat()
        # Links may form a loop.
        if (identity.st_dev, identity.st_ino) in seen:
            continue
        seen.add((identity.st_dev, identity.st_ino))
        watched.append(current)
        folders, files = entries(current)
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffixes is None or suffix.lower() in suffixes:
                yield prefix + name, stem
        pending.extend(f"{prefix}{name}/" for name in reversed(folders))


def read_lines(path: Path) -> list[str]:
    """Read the non-blank lines of a text list, without byte-order mark and carriage returns."""
    with named(path):
        text = read_text(path, None, encoding="utf-8-sig", errors="surrogateescape")
    # splitlines() would also split at characters that file names may contain.
    return [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]


def in_order(records: Iterable[tuple[str | None, Record]]) -> list[Record]:
    """Return the records with a file, ordered as in a listing: by file name, and in the given order for equal names."""
    having = [(name, record) for name, record in records if name is not None]
    return [record for _, record in sorted(having, key=lambda row: row[0])]


def prefix_of(folder: Path, root: Path) -> str:
    """Return the folder's path from the root, as a prefix for file names."""
    relative = folder.relative_to(root).as_posix()
    return "" if relative == "." else f"{relative}/"


# ---------------------------------------------------------------------------------------------------- writing
WriteMedia = Callable[[Path], object]


def write_lines(path: Path, lines: Iterable[str], newline: str = "\n") -> None:
    """Write a text file, and create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}{newline}" for line in lines), encoding="utf-8", newline="")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file without spaces, and create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def placeholder(path: Path) -> None:
    """Write a dummy media file, which is enough for a listing."""
    path.write_bytes(b"placeholder")


def put(path: Path, write: WriteMedia) -> None:
    """Create missing folders, then call `write` with the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)


def video_id(number: int, prefix: str = "v") -> str:
    """Return an ID of eleven characters, like YouTube's."""
    return f"{prefix}{number:0{11 - len(prefix)}d}"
