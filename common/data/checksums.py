"""Checksums that the publisher of a file states, or that a library which fetches it checks."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


def difference(path: Path, published: str) -> str | None:
    """Compare a file with its published checksum.

    Args:
        path: The file.
        published: `md5:` or `sha256:` and hexadecimal digits; fewer than all = those that the sum begins with.

    Returns:
        What differs, in words; None = nothing.

    Raises:
        OSError: The file cannot be read.
        ValueError: `published` has another form.
    """
    kind, _, expected = published.partition(":")
    if kind not in ("md5", "sha256") or not expected:
        raise ValueError(f"a checksum is md5:<digits> or sha256:<digits>, not {published!r}")
    found = digest(path, kind)
    if found.startswith(expected.lower()):
        return None
    return f"its {kind} is {found[: max(len(expected), 8)]}, published is {expected}: it is damaged, or another version"


def digest(path: Path, kind: str) -> str:
    """Checksum of a file in hexadecimal digits.

    Args:
        path: The file.
        kind: `md5` or `sha256`.
    """
    status = path.stat()
    return _digest(path, kind, (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=64)
def _digest(path: Path, kind: str, stamp: tuple[int, ...]) -> str:
    """Sum of a file, which two data sets may share; read once as long as its stamp stays."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
