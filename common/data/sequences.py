"""Lazy sequences that store items in columns or files, and a cache of columns. A column is a byte string or an array.

Millions of Python objects would take a gigabyte per loader process. Reading an object changes the reference count, so a
forked process would copy the memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from common.files import cache_folder, settled, stamp_of, write_atomically

Item = TypeVar("Item")
Columns = dict[str, npt.NDArray[Any]]


class MadeOnDemand(Sequence[Item]):
    """Base class of lazy sequences. Equals any sequence of the same items; slicing returns a list."""

    @abstractmethod
    def _item(self, position: int) -> Item:
        """Make the item at a position between 0 and length - 1."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._item(position) for position in range(*index.indices(len(self)))]
        return self._item(range(len(self))[index])

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]


class Texts(MadeOnDemand[str]):
    """Texts stored in one byte string. `errors` is the codec's error handler: `surrogateescape` for file names."""

    def __init__(self, texts: Iterable[str], errors: str = "surrogatepass") -> None:
        parts = [text.encode("utf-8", errors) for text in texts]
        self.ends = _offsets([len(text) for text in parts])
        self.buffer = b"".join(parts)
        self.errors = errors

    def __len__(self) -> int:
        return len(self.ends) - 1

    def _item(self, position: int) -> str:
        return self.buffer[self.ends[position] : self.ends[position + 1]].decode("utf-8", self.errors)


class Rows(MadeOnDemand[tuple[Item, ...]]):
    """Tuples of different lengths, stored in one `column` (`Texts` or int64). `starts` holds each tuple's start."""

    def __init__(self, rows: Iterable[Sequence[Item]], column: Callable[[Iterator[Item]], Any]) -> None:
        lengths: list[int] = []

        def values() -> Iterator[Item]:
            for row in rows:
                lengths.append(len(row))
                yield from row

        self.column = column(values())
        self.starts = _offsets(lengths)

    @classmethod
    def texts(cls, rows: Iterable[Sequence[str]]) -> Rows[str]:
        return Rows(rows, Texts)

    @classmethod
    def numbers(cls, rows: Iterable[Sequence[int]]) -> Rows[int]:
        return Rows(rows, lambda values: np.fromiter(values, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _item(self, position: int) -> tuple[Item, ...]:
        values = self.column[self.starts[position] : self.starts[position + 1]]
        return tuple(values.tolist() if isinstance(values, np.ndarray) else values)


def _offsets(lengths: list[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


class Packed(MadeOnDemand[Item]):
    """Items of any type, pickled into one byte string."""

    def __init__(self, items: Iterable[Item]) -> None:
        parts = [pickle.dumps(item) for item in items]
        self.ends = _offsets([len(part) for part in parts])
        self.buffer = b"".join(parts)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def _item(self, position: int) -> Item:
        return pickle.loads(self.buffer[self.ends[position] : self.ends[position + 1]])


def cached_columns(name: str, make: Callable[[], tuple[Columns, Iterable[Path]]]) -> Columns:
    """Return cached columns, or call `make` if a file or folder behind the columns has changed its mtime or ctime.

    A folder's times change when a file is added or removed. Both times are needed because unpacking an archive may
    reset the mtime. `make` returns the columns and the paths that it read. The columns are not cached if there are no
    paths, or if a path changed within the last two seconds, because another change right after could go unnoticed.
    """
    path = cache_folder() / "indices" / f"{name}.npz"
    with contextlib.suppress(Exception):  # If the cache is damaged, read the sources again.
        with np.load(path) as archive:
            columns = dict(archive)
        watched = json.loads(columns.pop("watched").tobytes())
        if all(stamp_of(Path(source)) == stamp for source, stamp in watched):
            return columns
    read_at = time.time()
    columns, sources = make()
    stamps = [(str(source), stamp_of(source)) for source in sorted(set(sources))]
    if stamps and all(settled(stamp, read_at) for _, stamp in stamps):
        stream = io.BytesIO()
        np.savez(stream, watched=np.frombuffer(json.dumps(stamps).encode(), np.uint8), **columns)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            write_atomically(path, stream.getvalue())
    return columns
