"""Reading media files that lie in the tar shards of a data set's folder, one by one and in any order.

Such a folder has the subfolders, lists and annotations of the data set as they are; its media files lie in
`webdataset/000000.tar`, ..., and `webdataset/index.npz` says where. They are asked for by the names they had, so that
data sets, samplers and training know nothing of shards. `common.data.shard_writing` makes such a folder.
"""

from __future__ import annotations

import bisect
import errno
import functools
import io
import json
import os
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

SHARD_FOLDER = "webdataset"
INDEX_NAME = "index.npz"
INDEX_SCHEMA = 1
#: In place of the number of a shard: the file could not be read when the shards were written.
PASSED_OVER = -1
# As many shards a process keeps open; a usual limit of open files is 1,024, and loader processes need some themselves.
OPEN_SHARDS = 256
_BUFFER_BYTES = 64 * 1024


class ShardError(ValueError):
    """A shard or its index is missing or damaged; the message names it and says what to do. No run should go on."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file lies.

    Args:
        name: Name relative to the data set's folder, with forward slashes.
        shard: Number of its shard; :data:`PASSED_OVER` = it could not be read.
        offset: First byte in the shard.
        size: Number of bytes.
    """

    name: str
    shard: int
    offset: int
    size: int


class _Names(Sequence[bytes]):
    """Strings as one buffer: millions of small Python objects would be copied into every loader process."""

    def __init__(self, buffer: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.buffer = buffer
        self.ends = ends

    @classmethod
    def of(cls, names: Sequence[bytes]) -> _Names:
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(np.frombuffer(b"".join(names), dtype=np.uint8), ends)

    def check(self) -> None:
        """Raises ValueError where the ends do not divide the buffer."""
        ends = self.ends
        if ends.ndim != 1 or self.buffer.ndim != 1 or self.buffer.dtype != np.uint8:
            raise ValueError("its names are no list")
        if (np.diff(ends, prepend=0) < 0).any() or (int(ends[-1]) if len(ends) else 0) != len(self.buffer):
            raise ValueError("its names do not fit their lengths")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        start = int(self.ends[index - 1]) if index else 0
        return self.buffer[start : int(self.ends[index])].tobytes()

    def find(self, name: bytes, low: int, high: int) -> int | None:
        """Position of a name among the sorted ones from `low` to before `high`; None = it is not there."""
        row = bisect.bisect_left(self, name, low, high)
        return row if row < high and self[row] == name else None


class ShardIndex:
    """Where every file of a sharded folder lies; a few arrays, sorted by folder and name.

    Args:
        root: The folder.
        columns: What :func:`index_columns` made.
        stamp: What changes when the index is written anew.

    Raises:
        KeyError: A column is missing.
        ValueError: The columns do not fit each other, or lead out of the folder or of a shard.
    """

    def __init__(self, root: Path, columns: Mapping[str, npt.NDArray[Any]], stamp: tuple[int, ...]) -> None:
        self.root = root
        self.stamp = stamp
        self.shards: list[str] = columns["shards"].tolist()
        self.shard_bytes: list[int] = columns["shard_bytes"].tolist()
        self._folders = _Names(columns["folders"], columns["folder_ends"])
        self._rows = columns["folder_rows"]
        self._names = _Names(columns["names"], columns["name_ends"])
        self._shard = columns["shard"]
        self._offset = columns["offset"]
        self._size = columns["size"]
        self.reasons: dict[str, str] = json.loads(columns["reasons"].tobytes())
        self._check()

    def _check(self) -> None:
        """An index may come from a stranger: it must not make this process read anything but its shards."""
        for name in self.shards:
            if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
                raise ValueError(f"{name!r} is no name of a shard")
        if len(self.shard_bytes) != len(self.shards):
            raise ValueError(f"{len(self.shards)} shards and {len(self.shard_bytes)} sizes")
        count = len(self._names)
        self._names.check()
        self._folders.check()
        rows = self._rows
        if rows.shape != (len(self._folders) + 1,) or rows[0] != 0 or rows[-1] != count or (np.diff(rows) < 0).any():
            raise ValueError("its folders do not hold its files")
        if any(column.shape != (count,) for column in (self._shard, self._offset, self._size)):
            raise ValueError(f"not every one of its {count} files has a place")
        if ((self._shard < PASSED_OVER) | (self._shard >= len(self.shards))).any():
            raise ValueError("a file lies in a shard that there is not")
        ends = np.array([*self.shard_bytes, 0], dtype=np.int64)[self._shard]
        kept = self._shard != PASSED_OVER
        # Written so that no sum overflows.
        outside = (self._offset < 0) | (self._size < 0) | (self._offset > ends) | (self._size > ends - self._offset)
        if (outside & kept).any():
            raise ValueError("a file lies outside its shard")
        if not isinstance(self.reasons, dict) or not all(isinstance(reason, str) for reason in self.reasons.values()):
            raise ValueError("its reasons are no texts")

    def names_in(self, folder: str) -> list[str]:
        """Names of the files of a folder ("" = the root), sorted."""
        rows = self._rows_of(folder)
        return [_decoded(self._names[row]) for row in rows]

    def find(self, name: str) -> Member | None:
        """Where a file lies; None = the shards do not hold it."""
        folder, _, own = name.rpartition("/")
        rows = self._rows_of(folder)
        row = self._names.find(_encoded(own), rows.start, rows.stop)
        if row is None:
            return None
        return Member(name, int(self._shard[row]), int(self._offset[row]), int(self._size[row]))

    def shard_path(self, shard: int) -> Path:
        """File of a shard."""
        return self.root / SHARD_FOLDER / self.shards[shard]

    def check_shards(self) -> None:
        """Look whether every shard is there and as long as it was when it was written.

        Raises:
            ShardError: One is not.
        """
        for shard, expected in enumerate(self.shard_bytes):
            path = self.shard_path(shard)
            try:
                found = path.stat().st_size
            except OSError as error:
                raise ShardError(f"{path}: {error.strerror}; {_ADVICE}") from None
            if found != expected:
                raise ShardError(f"{path}: has {found:,} bytes where its index expects {expected:,}; {_ADVICE}")

    def _rows_of(self, folder: str) -> range:
        row = self._folders.find(_encoded(folder), 0, len(self._folders))
        return range(0) if row is None else range(int(self._rows[row]), int(self._rows[row + 1]))


_ADVICE = "copy it anew, or write what is missing with `assemble data <paper> --data FOLDER --shards THIS_FOLDER`"


def index_columns(
    members: Iterable[Member], shards: Sequence[str], shard_bytes: Sequence[int], reasons: Mapping[str, str]
) -> dict[str, npt.NDArray[Any]]:
    """The columns of an index.

    Args:
        members: The files, in any order.
        shards: Names of the shards' files.
        shard_bytes: Their sizes.
        reasons: Why files could not be read, by name.
    """
    rows = sorted(
        (_encoded(folder), _encoded(own), member)
        for member in members
        for folder, _, own in [member.name.rpartition("/")]
    )
    folders = list(dict.fromkeys(folder for folder, _, _ in rows))
    folder_names, names = _Names.of(folders), _Names.of([own for _, own, _ in rows])
    return {
        "schema": np.array(INDEX_SCHEMA),
        "shards": np.array(shards, dtype=np.str_),
        "shard_bytes": np.array(shard_bytes, dtype=np.int64),
        "folders": folder_names.buffer,
        "folder_ends": folder_names.ends,
        "folder_rows": np.array([*_first_rows([folder for folder, _, _ in rows]), len(rows)], dtype=np.int64),
        "names": names.buffer,
        "name_ends": names.ends,
        "shard": np.array([member.shard for _, _, member in rows], dtype=np.int32),
        "offset": np.array([member.offset for _, _, member in rows], dtype=np.int64),
        "size": np.array([member.size for _, _, member in rows], dtype=np.int64),
        "reasons": np.frombuffer(json.dumps(dict(reasons), sort_keys=True).encode("ascii"), dtype=np.uint8),
    }


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _first_rows(folders: Sequence[bytes]) -> list[int]:
    return [row for row, folder in enumerate(folders) if not row or folders[row - 1] != folder]


# ---------------------------------------------------------------------------------------------------- finding files
def index_file(path: Path) -> Path | None:
    """The index that a folder or a file below one belongs to; None = it is no part of a sharded folder."""
    path = Path(os.path.abspath(path))
    for folder in (path, *path.parents):
        index = folder / SHARD_FOLDER / INDEX_NAME
        if index.is_file():
            return index
    return None


def unfinished(root: Path) -> bool:
    """Whether the writing of a folder's shards was begun and not ended."""
    return (root / SHARD_FOLDER).is_dir() and not (root / SHARD_FOLDER / INDEX_NAME).is_file()


def names_in(folder: Path) -> list[str]:
    """Names of the files that shards hold of a folder, sorted.

    Raises:
        ShardError: The index cannot be read, or a shard is missing or has another length.
    """
    found = index_file(folder)
    if found is None:
        return []
    index = _index(found)
    return index.names_in(_relative(folder, index)) or index.names_in(_real(folder, index))


def exists(path: Path) -> bool:
    """Whether a file is there, on its own or in a shard."""
    return path.is_file() or _find(path) is not None


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew, on its own or in a shard: a time in nanoseconds and its size.

    Raises:
        OSError: There is no such file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        found = _find(path)
        if found is None:
            raise
        index, member = found
        return index.stamp[0], member.size
    return status.st_mtime_ns, status.st_size


def source(path: Path) -> str | BinaryIO:
    """What a decoder should open: the path where there is such a file, or none at all; else the file in its shard.

    Raises:
        OSError: The file could not be read when the shards were written; the message says why. Or it is a pipe
            or a device, which a reader might wait for without end.
        ShardError: Its shard is missing or damaged.
    """
    if os.path.lexists(path):
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise OSError("is no file")
        return os.fspath(path)
    found = _find(path)
    if found is None:
        return os.fspath(path)
    index, member = found
    if member.shard == PASSED_OVER:
        raise OSError(index.reasons.get(member.name, "could not be read when the shards were written"))
    return io.BufferedReader(_Part(_opened(index, member.shard), member, os.fspath(path)), _BUFFER_BYTES)


def _find(path: Path) -> tuple[ShardIndex, Member] | None:
    found = index_file(path.parent)
    if found is None:
        return None
    index = _index(found)
    member = index.find(_relative(path, index)) or index.find(_real(path, index))
    return None if member is None else (index, member)


def _relative(path: Path, index: ShardIndex) -> str:
    return _named(Path(os.path.abspath(path)).relative_to(index.root))


def _real(path: Path, index: ShardIndex) -> str:
    """Where links between the folders lead to, relative to the root; what no shard holds if it is outside."""
    real, root = path.resolve(), index.root.resolve()
    return _named(real.relative_to(root)) if real.is_relative_to(root) else os.fspath(real)


def _named(relative: Path) -> str:
    return "" if relative == Path() else relative.as_posix()


def _index(path: Path) -> ShardIndex:
    status = path.stat()
    return _read_index(path, (status.st_mtime_ns, status.st_size, status.st_ino))


@functools.lru_cache(maxsize=16)
def _read_index(path: Path, stamp: tuple[int, ...]) -> ShardIndex:
    try:
        with np.load(path, allow_pickle=False) as content:
            columns = {name: content[name] for name in content}
        if int(columns["schema"]) != INDEX_SCHEMA:
            raise ShardError(f"{path}: made by another version of the suite; {_ADVICE}")
        index = ShardIndex(path.parent.parent, columns, stamp)
    except ShardError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ShardError(f"{path}: no index of shards, or damaged ({error}); {_ADVICE}") from None
    index.check_shards()
    return index


# ---------------------------------------------------------------------------------------------------- reading
class _Shard:
    """A shard that this process has open; closed when nothing reads from it any more."""

    def __init__(self, path: Path, expected: int) -> None:
        try:
            self.file = path.open("rb", buffering=0)
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror}; {_ADVICE}") from None
        found = os.fstat(self.file.fileno()).st_size
        if found != expected:
            self.file.close()
            raise ShardError(f"{path}: has {found:,} bytes where its index expects {expected:,}; {_ADVICE}")


class _Part(io.RawIOBase):
    """The bytes of one file in a shard. Reads by position, so that threads can share the shard."""

    def __init__(self, shard: _Shard, member: Member, name: str) -> None:
        super().__init__()
        self._shard = shard
        self._member = member
        self._place = 0
        self.name = name  # decoders take a hint from its ending, as they do for a file of its own

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._member.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "position before the beginning")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self._member.size - self._place, 0))
        if not wanted:
            return 0
        data = os.pread(self._shard.file.fileno(), wanted, self._member.offset + self._place)
        if not data:
            raise ShardError(f"{self._shard.file.name}: ends before {self._member.name} does; {_ADVICE}")
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


_lock = threading.Lock()
_open_shards: OrderedDict[tuple[Path, tuple[int, ...]], _Shard] = OrderedDict()


def _opened(index: ShardIndex, number: int) -> _Shard:
    path = index.shard_path(number)
    key = (path, index.stamp)  # a shard that was written anew is another one
    with _lock:
        shard = _open_shards.get(key)
        if shard is None:
            shard = _open_shards[key] = _Shard(path, index.shard_bytes[number])
        _open_shards.move_to_end(key)
        while len(_open_shards) > OPEN_SHARDS:
            _open_shards.popitem(last=False)
        return shard


def _forget_parent() -> None:
    """A loader process opens shards of its own; the lock may have been held when it began."""
    global _lock
    _lock = threading.Lock()
    _open_shards.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
