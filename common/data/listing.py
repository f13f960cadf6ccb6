"""Listings: the items of a data set in a fixed order; imports neither torch nor a decoder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.data.sequences import MadeOnDemand, Texts

_KEPT = ("name", "version", "classes", "missing", "missing_names", "layout", "notes")


class DatasetError(ValueError):
    """A file of a data set is damaged, or contradicts another; the message names it."""


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


#: Numbers of a clip in a :class:`ClipTable`; NaN = None.
NUMBERS = np.dtype(
    [("label", "<i4"), ("sound_label", "<i4"), ("fold", "<i2"), ("start", "<f8"), ("end", "<f8")], align=True
)


class ClipTable(MadeOnDemand[Clip]):
    """The clips of a listing as columns, because two million Python objects would take a gigabyte per loader process.

    Args:
        names: file names with forward slashes, relative to `root`.
        numbers: one row of `NUMBERS` per name; None = neither labels nor folds nor limits.
        sounds: names of the files with the sound ("" = in the file itself); empty = of no clip.
    """

    def __init__(
        self, root: Path, names: Iterable[str], numbers: npt.ArrayLike | None = None, sounds: Iterable[str] = ()
    ) -> None:
        self.root = Path(root)
        self.names = Texts(names, "surrogateescape")
        unlabeled = np.full(len(self.names), np.array((-1, -1, 0, np.nan, np.nan), NUMBERS))
        self.numbers = unlabeled if numbers is None else np.asarray(numbers, NUMBERS)
        self.sounds = Texts(sounds)

    @classmethod
    def of(cls, root: Path, clips: Iterable[Clip]) -> ClipTable:
        rows = list(clips)
        limits = [[np.nan if limit is None else limit for limit in (clip.start, clip.end)] for clip in rows]
        return cls(
            root,
            (_relative(clip.path, root) for clip in rows),
            [(clip.label, clip.sound_label, clip.fold, *own) for clip, own in zip(rows, limits)],
            ["" if clip.sound is None else _relative(clip.sound, root) for clip in rows],
        )

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> ClipTable:
        rows = np.asarray(indices, dtype=np.int64)
        sounds = [self.sounds[int(row)] for row in rows] if self.sounds else ()
        return ClipTable(self.root, (self.names[int(row)] for row in rows), self.numbers[rows], sounds)

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

    def digest(self) -> str:
        """SHA-256 over relative names, numbers and sound files, in order; independent of the root."""
        state = hashlib.sha256(b"listing 1\0" + self.names.ends.astype("<i8").tobytes())
        for column in NUMBERS.names or ():
            state.update(self.numbers[column].tobytes())
        state.update(self.names.buffer)
        if self.sounds.buffer:
            state.update(b"sounds\0" + self.sounds.ends.astype("<i8").tobytes() + self.sounds.buffer)
        return state.hexdigest()


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
        for name in ("classes", "missing_names", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.clips, ClipTable):
            object.__setattr__(self, "clips", ClipTable.of(self.root, self.clips))

    @property
    def table(self) -> ClipTable:
        assert isinstance(self.clips, ClipTable)
        return self.clips

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self.table.numbers["label"]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        return self.table[index]

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over relative names, labels and order; independent of the root."""
        return self.table.digest()

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Listing:
        version = f"{self.version}, {len(indices)} of {len(self)}"
        return replace(self, version=version, clips=self.table.take(indices))

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as columns, for a cache."""
        kept = {name: getattr(self, name) for name in _KEPT}
        kept |= {"root": str(self.root), "names": list(self.table.names), "sounds": list(self.table.sounds)}
        return {"numbers": self.table.numbers, "kept": np.frombuffer(json.dumps(kept).encode(), np.uint8)}

    @classmethod
    def of_columns(cls, columns: Mapping[str, npt.NDArray[Any]]) -> Listing:
        kept = json.loads(columns["kept"].tobytes())
        root = Path(kept["root"])
        clips = ClipTable(root, kept["names"], columns["numbers"], kept["sounds"])
        return cls(clips=clips, root=root, **{name: kept[name] for name in _KEPT})
