"""Checksums that the publisher of a file states, or that a library which fetches it checks."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


def difference(path: Path, published: str) -> str | None:
    """What differs between a file and its published checksum, in words; None where nothing does.

    Args:
        path: the file.
        published: `md5:` or `sha256:` and hexadecimal digits; fewer than all are those that the sum begins with.
    """
    kind, _, expected = published.partition(":")
    found = digest(path, kind)
    if found.startswith(expected.lower()):
        return None
    return f"its {kind} is {found[: max(len(expected), 8)]}, expected is {expected}: it is damaged, or another version"


def problem(path: Path, published: str) -> str | None:
    """As `difference`; a file that cannot be read differs, too."""
    try:
        return difference(path, published)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def digest(path: Path, kind: str) -> str:
    """The `md5` or `sha256` of a file in hexadecimal digits."""
    status = path.stat()
    return _digest(path, kind, (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=64)
def _digest(path: Path, kind: str, stamp: tuple[int, ...]) -> str:
    """Sum of a file, which two data sets may share; read once as long as its stamp stays."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
