"""Errors that are the user's to fix, which end in a message and not in a traceback, and the wording they share."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class ReportingError(ValueError):
    """A record, a tables file or a request is wrong; the message says where and what to do."""


class StageError(RuntimeError):
    """A stage cannot run or go on; the message says why and what to do."""


class RunsElsewhereError(StageError):
    """Another process runs this stage at the moment."""


class NonFiniteLossError(StageError):
    """The loss became infinite or not a number."""


class Preempted(BaseException):
    """A signal asked the process to end; the same command resumes.

    No `Exception`, so that nothing takes it for a failure, and no `KeyboardInterrupt`, which Lightning turns into an
    exit.

    Args:
        signal: number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal

    @property
    def status(self) -> int:
        """Exit status that shells give to such an end."""
        return 128 + self.signal


def optional_package(name: str, extra: str) -> Any:
    """Import a package that is installed with an extra of this project.

    Raises:
        StageError: it is missing; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise StageError(
            f"the package {name} is missing: run `make extra-{extra}` in a checkout, "
            f"or pip install 'representation-assemble[{extra}]'"
        ) from None


def is_ours(error: BaseException) -> bool:
    """Whether an error is of a class of this suite, whose message is worded for its user: then where adds nothing."""
    return type(error).__module__.partition(".")[0] in ("common", "papers")


def printable(text: str) -> str:
    """A text of others, such as the name of a file, without signs that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


#: Names that are shown at once; of more, only the nearest.
SHOWN, NEAR = 20, 5


def nearest(name: str, valid: Iterable[str]) -> str:
    """Words that point from a misspelt name to the nearest valid one.

    Args:
        name: what was written.
        valid: the names that would have been accepted.

    Returns:
        ``"did you mean 'x'? valid: ..."``, or only the valid names when none is near; of many names the nearest few.
    """
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(names) > SHOWN:
        near = difflib.get_close_matches(name, names, n=NEAR, cutoff=0.0)
        return f"{hint}the nearest of {len(names)} are: {', '.join(near)}"
    return f"{hint}valid: {', '.join(names) if names else '(none)'}"
