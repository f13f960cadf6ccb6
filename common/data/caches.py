"""In-memory caches of file contents, per process."""

from __future__ import annotations

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

Content = TypeVar("Content")
# Path, mtime and size.
FileKey = tuple[str, int, int]


class FileCache(ABC, Generic[Content]):
    """LRU cache of file contents. Failures are cached too, as messages."""

    _shared: ClassVar[Any] = None

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.dropped = 0
        self._entries: OrderedDict[FileKey, tuple[Content | str, int]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    @classmethod
    def shared(cls, max_bytes: int) -> Self:
        """This process's cache of this kind, which grows to the largest bound requested."""
        if cls._shared is None:
            cls._shared = cls(max_bytes)
        cls._shared.max_bytes = max(cls._shared.max_bytes, max_bytes)
        return cls._shared

    @property
    def nbytes(self) -> int:
        return self._held

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickled in another process, the cache is empty.
        kind = type(self)
        return (kind.shared if self is kind._shared else kind, (self.max_bytes,))

    def fill(self, paths: Iterable[Path], unreadable: type[Exception]) -> None:
        """Read files until the cache is full; ignores those that raise `unreadable`."""
        before = self.dropped
        for path in paths:
            with contextlib.suppress(unreadable):
                self.get(path)
            if self.dropped > before:
                return

    @abstractmethod
    def get(self, path: Path) -> Any:
        """The content of a file, read on the first call."""

    def _key(self, path: Path) -> FileKey:
        found = path.stat()
        return os.fspath(path), found.st_mtime_ns, found.st_size

    def _find(self, key: FileKey) -> tuple[Content | str] | None:
        """A 1-tuple of a file's cached content or failure message."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][:1]

    def _keep(self, key: FileKey, entry: Content | str, size: int) -> None:
        with self._lock:
            if key not in self._entries:
                self._entries[key] = entry, size
                self._held += size
            while self._held > self.max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self._held -= freed
                self.dropped += 1
