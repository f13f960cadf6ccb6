"""Checksums published by a file's author or by a library that downloads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from common.data.annotations import read_once


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


@read_once(64)  # two data sets may share a file
def digest(path: Path, kind: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
