"""Listings: the items of a data set in a fixed order, and their cache; imports neither torch nor a decoder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.data.sequences import MadeOnDemand, Texts
from common.files import settled, stamp_of, write_atomically

INDEX_SCHEMA = 1


class DatasetMissing(FileNotFoundError):
    """A data set or part of it was not found; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One item of a data set.

    Args:
        label: class of the clip (of the picture if picture and sound have separate labels); -1 = unknown.
        sound_label: class of the sound; -1 = none.
        fold: official fold, from 1; 0 = the set has no folds.
        start, end: limits inside the file in seconds; None = those of the file.
        sound: file with the sound, on the same clock; None = the sound is in the file itself.
    """

    path: Path
    label: int
    sound_label: int = -1
    fold: int = 0
    start: float | None = None
    end: float | None = None
    sound: Path | None = None


class ClipTable(MadeOnDemand[Clip]):
    """The clips of a listing as columns, because two million Python objects would take a gigabyte per loader process.

    Args:
        names: file names with forward slashes, relative to ``root``.
        labels: one class per name; likewise ``sound_labels``, ``folds``, ``starts``, ``ends`` (NaN = None).
        sounds: names of the files with the sound ("" = in the file itself); None = of no clip.
    """

    __slots__ = ("_names", "ends", "folds", "labels", "root", "sound_labels", "sounds", "starts")

    def __init__(
        self,
        root: Path,
        names: Iterable[str],
        labels: npt.ArrayLike,
        sound_labels: npt.ArrayLike | None = None,
        folds: npt.ArrayLike | None = None,
        starts: npt.ArrayLike | None = None,
        ends: npt.ArrayLike | None = None,
        sounds: Sequence[str] | None = None,
    ) -> None:
        self.root = Path(root)
        self._names = Texts(names, "surrogateescape")
        count = len(self._names)
        self.labels = np.asarray(labels, dtype=np.int32).reshape(-1)
        self.sound_labels = _column(sound_labels, count, -1, np.int32)
        self.folds = _column(folds, count, 0, np.int16)
        self.starts = _column(starts, count, np.nan, np.float64)
        self.ends = _column(ends, count, np.nan, np.float64)
        for column in (self.labels, self.sound_labels, self.folds, self.starts, self.ends):
            if len(column) != count:
                raise ValueError(f"a column of {len(column)} values for {count} clips")
        self.sounds = Texts(sounds) if sounds is not None and any(sounds) else None
        if self.sounds is not None and len(self.sounds) != count:
            raise ValueError(f"{len(self.sounds)} files with sound for {count} clips")

    @classmethod
    def of(cls, root: Path, clips: Iterable[Clip]) -> ClipTable:
        rows = list(clips)
        return cls(
            root,
            (_relative(clip.path, root) for clip in rows),
            [clip.label for clip in rows],
            [clip.sound_label for clip in rows],
            [clip.fold for clip in rows],
            [np.nan if clip.start is None else clip.start for clip in rows],
            [np.nan if clip.end is None else clip.end for clip in rows],
            ["" if clip.sound is None else _relative(clip.sound, root) for clip in rows],
        )

    def name(self, index: int) -> str:
        """File name relative to the root, with forward slashes."""
        return self._names[index]

    def names(self) -> list[str]:
        return list(self._names)

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> ClipTable:
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        return ClipTable(
            self.root,
            (self.name(int(row)) for row in rows),
            self.labels[rows],
            self.sound_labels[rows],
            self.folds[rows],
            self.starts[rows],
            self.ends[rows],
            None if self.sounds is None else [self.sounds[int(row)] for row in rows],
        )

    def __len__(self) -> int:
        return len(self._names)

    def _item(self, position: int) -> Clip:
        start, end = float(self.starts[position]), float(self.ends[position])
        sound = "" if self.sounds is None else self.sounds[position]
        return Clip(
            path=joined(self.root, self.name(position)),
            label=int(self.labels[position]),
            sound_label=int(self.sound_labels[position]),
            fold=int(self.folds[position]),
            start=None if np.isnan(start) else start,
            end=None if np.isnan(end) else end,
            sound=joined(self.root, sound) if sound else None,
        )

    def __repr__(self) -> str:
        return f"ClipTable({len(self)} clips under {self.root})"

    def digest(self) -> str:
        """SHA-256 over relative names, labels, folds, limits and sound files, in order; independent of the root."""
        state = hashlib.sha256(b"listing 1\0")
        for column, kind in (
            (self._names.ends, "<i8"),
            (self.labels, "<i4"),
            (self.sound_labels, "<i4"),
            (self.folds, "<i2"),
            (self.starts, "<f8"),
            (self.ends, "<f8"),
        ):
            state.update(np.ascontiguousarray(column, dtype=kind).tobytes())
        state.update(self._names.buffer)
        if self.sounds is not None:
            state.update(b"sounds\0" + np.ascontiguousarray(self.sounds.ends, dtype="<i8").tobytes())
            state.update(self.sounds.buffer)
        return state.hexdigest()


def _column(values: npt.ArrayLike | None, count: int, default: float, kind: Any) -> npt.NDArray[Any]:
    return np.full(count, default, dtype=kind) if values is None else np.asarray(values, dtype=kind).reshape(-1)


def spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread."""
    return np.linspace(0, count - 1, min(most, count), dtype=np.int64).tolist()


def joined(root: Path, name: str) -> Path:
    """The path of a name; one that begins with `..` is relative to the root itself, even if that is a link."""
    return Path(os.path.normpath(root / name)) if name.startswith("../") else root / name


def _relative(path: Path, root: Path) -> str:
    # A clip outside the root keeps its absolute name, which survives joining.
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


@dataclass(frozen=True, eq=False)
class Listing:
    """The clips of one split of one data set, in a fixed order.

    The position of a clip is its row in a memory bank, so a bank only fits the listing it was trained on.

    Args:
        version: split, fold and layout, for records.
        clips: a sequence of :class:`Clip` is stored as a :class:`ClipTable`.
        classes: class names; the label of a clip is a position here.
        missing, missing_names: number and examples of items that the official lists name but the folder lacks.
    """

    name: str
    version: str
    clips: Sequence[Clip]
    classes: tuple[str, ...]
    root: Path
    missing: int = 0
    missing_names: tuple[str, ...] = ()
    layout: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "classes", tuple(self.classes))
        if not isinstance(self.clips, ClipTable):
            object.__setattr__(self, "clips", ClipTable.of(self.root, self.clips))
        labels = self.labels
        if len(labels) and self.classes and (labels.max() >= len(self.classes) or labels.min() < -1):
            raise ValueError(
                f"{self.name}: labels run from {labels.min()} to {labels.max()}, "
                f"but there are {len(self.classes)} classes"
            )

    @property
    def table(self) -> ClipTable:
        assert isinstance(self.clips, ClipTable)
        return self.clips

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self.table.labels

    @property
    def folds(self) -> npt.NDArray[np.int16]:
        return self.table.folds

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        return self.table[index]

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over relative names, labels and order; independent of the root."""
        return self.table.digest()

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Listing:
        return Listing(
            self.name,
            f"{self.version}, {len(indices)} of {len(self)}",
            self.table.take(indices),
            self.classes,
            self.root,
            self.missing,
            self.missing_names,
            self.layout,
            self.notes,
        )


class ListingIndex:
    """A listing kept as JSON, valid while its folders and lists have the same mtime and ctime.

    Adding or removing a file changes the folder's; unpacking an archive may reset the mtime alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Listing | None:
        """The stored listing, or None if it is missing, out of date or unreadable."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["schema"] != INDEX_SCHEMA:
                return None
            if any(stamp_of(Path(path)) != stamp for path, stamp in document["watched"]):
                return None
            columns = document["columns"]
            root = Path(document["root"])
            table = ClipTable(
                root,
                _text(document["names"]),
                columns["label"],
                columns.get("sound_label"),
                columns.get("fold"),
                _limits(columns.get("start")),
                _limits(columns.get("end")),
                columns.get("sound"),
            )
            return Listing(
                document["name"],
                document["version"],
                table,
                tuple(document["classes"]),
                root,
                document["missing"],
                tuple(_text(document["missing_names"])),
                document["layout"],
                tuple(_text(document.get("notes", []))),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Listing again repairs any damaged cache.
            return None

    def store(self, listing: Listing, watched: Iterable[Path], scanned_at: float | None = None) -> bool:
        """Store a listing whose `watched` paths were read after `scanned_at` (None = now); returns whether it worked.

        It fails if a folder changed in the last two seconds (changes could go unnoticed) or the cache is not writable.
        """
        stamps = [(str(path), stamp_of(path)) for path in sorted(set(watched))]
        if not all(settled(stamp, scanned_at) for _, stamp in stamps):
            return False
        table = listing.table
        columns: dict[str, list[Any]] = {"label": table.labels.tolist()}
        if (table.sound_labels != -1).any():
            columns["sound_label"] = table.sound_labels.tolist()
        if table.folds.any():
            columns["fold"] = table.folds.tolist()
        for key, values in (("start", table.starts), ("end", table.ends)):
            if not np.isnan(values).all():
                columns[key] = [None if np.isnan(value) else value for value in values.tolist()]
        if table.sounds is not None:
            columns["sound"] = list(table.sounds)
        document = {
            "schema": INDEX_SCHEMA,
            "name": listing.name,
            "version": listing.version,
            "layout": listing.layout,
            "root": str(listing.root),
            "classes": list(listing.classes),
            "missing": listing.missing,
            "missing_names": list(listing.missing_names),
            "notes": list(listing.notes),
            "count": len(listing),
            "watched": stamps,
            "columns": columns,
            "names": table.names(),
        }
        try:
            write_atomically(self.path, json.dumps(document, sort_keys=True))
        except OSError:
            return False
        return True


def _text(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("not a list of strings")
    return values


def _limits(values: list[float | None] | None) -> list[float] | None:
    return None if values is None else [np.nan if value is None else value for value in values]
