"""Checksums published by a file's author or by a library that downloads it."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from common.files import open_regular


def problem(path: Path, published: str) -> str | None:
    """Why a file does not match a checksum such as `md5:0123abcd` (a prefix is enough), or None."""
    kind, _, expected = published.partition(":")
    try:
        found = digest(path, kind)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found.startswith(expected):
        return None
    return f"its {kind} is {found[: max(len(expected), 8)]}, expected {expected}: damaged, or another version"


def digest(path: Path, kind: str) -> str:
    status = path.stat()
    return _digest(path, kind, (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=64)
def _digest(path: Path, kind: str, stamp: tuple[int, ...]) -> str:
    """Digest of a file, cached until its stamp changes, because two data sets may share it."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
