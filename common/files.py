"""Writing a file so that a reader, a crash or a full disk never meets half of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class AtomicWriteError(OSError):
    """A file could not be written; what stood there before is untouched."""


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file's text in one step: temporary file in the same folder, fsync, rename.

    Args:
        path: the file; missing folders are made.
        text: the whole new text, written as UTF-8.

    Raises:
        AtomicWriteError: when the disk is full or the folder not writable. The old file is intact and the
            temporary one gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror or str(error)
        raise AtomicWriteError(
            error.errno,
            f"could not write {path}: {reason}. The file that was there before, if any, is unchanged; "
            "free space or fix the permissions, then run the same command again",
        ) from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system can, and none needs it for consistency."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
