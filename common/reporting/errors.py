"""Errors that are the user's to fix, and the wording they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReportingError(ValueError):
    """A record, a tables file or a request is wrong; the message says where and what to do."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Words that point from a misspelt name to the nearest valid one.

    Args:
        name: what was written.
        valid: the names that would have been accepted.

    Returns:
        ``"did you mean 'x'? valid: ..."``, or only the valid names when none is near.
    """
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names) if names else '(none)'}"
