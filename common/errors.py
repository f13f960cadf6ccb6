"""Errors that users see as a message without a traceback, and helpers for messages."""

from __future__ import annotations

import difflib
import errno
import importlib
from collections.abc import Iterable
from typing import Any


class ReportingError(ValueError):
    """A record, tables file or request is invalid. The message says where and what to do."""


class ConfigurationError(ValueError):
    """A configuration is invalid. The message names the file and the field, and says what to do."""


class StageError(RuntimeError):
    """A stage cannot run or continue. The message says why and what to do."""


class OtherCodeError(RuntimeError):
    """Finished stages were trained by a different version of the code. The user decides whether to rerun them."""


class NonFiniteLossError(StageError):
    """The loss is infinite or NaN."""


class Preempted(BaseException):
    """A signal asked the process to stop. The class doesn't extend `Exception`, so that Lightning doesn't catch it."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal

    @property
    def status(self) -> int:
        """Return the exit status for the signal, by shell convention."""
        return 128 + self.signal


class StopRequest:
    """Remembers the signal that asked this process to stop. A long loop calls `check` between steps."""

    received: int | None = None

    def check(self, error: BaseException | None = None) -> None:
        """Raise `Preempted` if a signal was received, with `error` as its cause."""
        if self.received is not None:
            raise Preempted(self.received) from error


#: The application's signal handler sets it.
STOP = StopRequest()


def optional_package(name: str, extra: str) -> Any:
    """Import a package, or raise an error that tells the user to install the optional `extra`."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise StageError(
            f"the package {name} is missing: run `make extra-{extra}` in a checkout, "
            f"or pip install 'representation-assemble[{extra}]'"
        ) from None


def is_ours(error: BaseException) -> bool:
    """Return whether this project defines the error's class. If so, the message needs no traceback."""
    return type(error).__module__.partition(".")[0] in ("common", "papers")


def printable(text: str) -> str:
    """Remove terminal control characters from untrusted text, such as a file name."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def message(error: BaseException) -> str:
    """Return an error's text for the terminal. For a full disk, add what to do."""
    text = printable(str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        text += (
            "\nFree space, or choose another disk (--runs for runs, ASSEMBLE_CACHE for caches, TMPDIR for the rest), "
            "then rerun the command; earlier files are unchanged."
        )
    return text


def nearest(name: str, valid: Iterable[str]) -> str:
    """Suggest a valid name: `did you mean 'x'? valid: ...`. If there are over 20 names, list only the nearest five."""
    names = sorted(set(valid))
    cased = {option.lower(): option for option in names}
    close = difflib.get_close_matches(name.lower(), cased, n=1, cutoff=0.5)
    hint = f"did you mean {cased[close[0]]!r}? " if close else ""
    if len(names) > 20:
        near = difflib.get_close_matches(name.lower(), cased, n=5, cutoff=0.0)
        return f"{hint}the nearest of {len(names)} are: {', '.join(cased[one] for one in near)}"
    return f"{hint}valid: {', '.join(names) or '(none)'}"
