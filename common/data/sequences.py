"""Lazy sequences over columns (one byte string or array) or files.

Millions of Python objects would take a gigabyte per loader process: reading changes reference counts, so forked
processes copy them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

Item = TypeVar("Item")


class MadeOnDemand(Sequence[Item]):
    """A lazy sequence; equals any sequence of the same items except text. A slice is a list."""

    __slots__ = ()

    @abstractmethod
    def _item(self, position: int) -> Item:
        """Make the item at a position from 0 to length - 1."""

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
        if isinstance(other, Sequence) and not isinstance(other, str | bytes):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]


class Texts(MadeOnDemand[str]):
    """Texts in one byte string; `errors` handles characters that UTF-8 lacks (`surrogateescape` for file names)."""

    __slots__ = ("buffer", "ends", "errors")

    def __init__(self, texts: Iterable[str], errors: str = "surrogatepass") -> None:
        parts = [text.encode("utf-8", errors) for text in texts]
        self.ends = _offsets([len(text) for text in parts])
        self.buffer = b"".join(parts)
        self.errors = errors

    def __len__(self) -> int:
        return len(self.ends) - 1

    def _item(self, position: int) -> str:
        return self.buffer[self.ends[position] : self.ends[position + 1]].decode("utf-8", self.errors)

    def __repr__(self) -> str:
        return f"Texts({len(self)} texts)"


class Rows(MadeOnDemand[tuple[Item, ...]]):
    """Rows of different lengths in one column (`Texts` or int64), which begin at `starts`; a list of tuples."""

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
        own = self.column[self.starts[position] : self.starts[position + 1]]
        return tuple(own.tolist() if isinstance(own, np.ndarray) else own)

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows, {self.starts[-1]} values)"


def _offsets(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)
