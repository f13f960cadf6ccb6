"""Listings: the items of a data set in a fixed order. This module imports neither torch nor a decoder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.data.sequences import MadeOnDemand, Texts
from common.files import stamp_of


class DatasetError(ValueError):
    """A data set's file is damaged or contradicts another file; the message names it."""


class DatasetMissing(FileNotFoundError):
    """A data set or part of it was not found; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One item of a data set.

    Args:
        label: class of the clip; if the sound has a separate label, class of the picture. -1 = unknown.
        sound_label: class of the sound; -1 = none.
        fold: official fold, from 1; 0 = the set has no folds.
        start, end: part of the file in seconds; None = from the file's start, or to its end.
        sound: separate sound file with the same times; None = the clip's file contains the sound.
    """

    path: Path
    label: int
    sound_label: int = -1
    fold: int = 0
    start: float | None = None
    end: float | None = None
    sound: Path | None = None

    def stamps(self) -> list[tuple[str, list[int]]]:
        """Return the paths and stamps of the clip's files. Unlike a fingerprint, stamps show changes of content."""
        return [(os.path.abspath(path), stamp_of(path)) for path in (self.path, self.sound) if path is not None]


#: Numbers of a clip in a listing; NaN means None.
NUMBERS = np.dtype(
    [("label", "<i4"), ("sound_label", "<i4"), ("fold", "<i2"), ("start", "<f8"), ("end", "<f8")], align=True
)
#: Numbers of a clip that has no label, fold or limits.
UNLABELED = np.array((-1, -1, 0, np.nan, np.nan), NUMBERS)


def spread(count: int, most: int) -> list[int]:
    """Return evenly spaced indices from 0 to `count - 1`, at most `most` of them."""
    return np.linspace(0, count - 1, min(most, count), dtype=np.int64).tolist()


def joined(root: Path, name: str) -> Path:
    """Join `name` to the root. A leading `..` shortens the root's path as text, without following links."""
    return Path(os.path.normpath(root / name)) if name.startswith("../") else root / name


def file_names(names: Iterable[str]) -> Texts:
    """Store file names with forward slashes. Names may contain any bytes."""
    return Texts(names, "surrogateescape")


@dataclass(frozen=True, eq=False)
class Listing(MadeOnDemand[Clip]):
    """The clips of one split of a data set, in a fixed order, stored as columns.

    Columns save memory: two million Python objects would take a gigabyte per loader process. A clip's position is also
    the clip's row in a memory bank, so a bank only fits the listing of its training.

    Args:
        version: split, fold and layout, for records.
        classes: class names; a clip's label is an index into them.
        names: file names relative to `root`, made by :func:`file_names`.
        numbers: structured array with a row of dtype `NUMBERS` per name.
        sounds: names of separate sound files, "" for a clip that contains its sound. Leave empty if no clip has a
            separate file.
        missing, missing_names: the official lists name items that the folder lacks: their number, and some names.
    """

    name: str
    version: str
    root: Path
    classes: tuple[str, ...]
    names: Texts
    numbers: npt.NDArray[Any]
    sounds: Texts = field(default_factory=lambda: Texts(()))
    missing: int = 0
    missing_names: tuple[str, ...] = ()
    layout: str = ""
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self.numbers["label"]

    def __len__(self) -> int:
        return len(self.names)

    def _item(self, position: int) -> Clip:
        label, sound_label, fold, start, end = self.numbers[position].item()
        sound = self.sounds[position] if self.sounds else ""
        return Clip(
            joined(self.root, self.names[position]),
            label,
            sound_label,
            fold,
            None if np.isnan(start) else start,
            None if np.isnan(end) else end,
            joined(self.root, sound) if sound else None,
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of relative names, numbers and sound file names. The root has no effect."""
        state = hashlib.sha256(b"listing 1\0" + self.names.ends.astype("<i8").tobytes())
        for column in NUMBERS.names or ():
            state.update(self.numbers[column].tobytes())
        state.update(self.names.buffer)
        if self.sounds.buffer:
            state.update(b"sounds\0" + self.sounds.ends.astype("<i8").tobytes() + self.sounds.buffer)
        return state.hexdigest()

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Listing:
        rows = [int(row) for row in indices]
        return replace(
            self,
            version=f"{self.version}, {len(rows)} of {len(self)}",
            names=file_names(self.names[row] for row in rows),
            numbers=self.numbers[rows],
            sounds=Texts(self.sounds[row] for row in rows if self.sounds),
        )

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return all contents as columns, to be cached."""
        kept = vars(self) | {"root": str(self.root), "names": list(self.names), "sounds": list(self.sounds)}
        del kept["numbers"]
        return {"numbers": self.numbers, "kept": np.frombuffer(json.dumps(kept).encode(), np.uint8)}

    @classmethod
    def of_columns(cls, columns: Mapping[str, npt.NDArray[Any]]) -> Listing:
        kept = json.loads(columns["kept"].tobytes())
        root, names, sounds = Path(kept.pop("root")), file_names(kept.pop("names")), Texts(kept.pop("sounds"))
        others: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in kept.items()}
        return cls(root=root, names=names, numbers=columns["numbers"], sounds=sounds, **others)
