"""What each benchmark does to captions before tokenizing. Source: docs/papers/vx2text.md [11] (protocols, traps)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

Protocol = Literal["coco", "tvc", "avsd_1ref", "avsd7", "avsd8"]

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def keep(text: str) -> str:
    return text


def ascii_only(text: str) -> str:
    """Every non-ASCII character as one space, ends stripped."""
    return _NOT_ASCII.sub(" ", text).strip()


def without_short_words(text: str) -> str:
    """Without the words of exactly one character, such as `a`, `i` and `2`.

    The official DSTC7 stop-word list uses a full stop as a regular expression, so it matches any character. The
    published numbers have this defect.
    """
    return " ".join(word for word in text.split() if len(word) != 1)


def without_stops(text: str) -> str:
    """Without the words `,` and `.`, as the stop-word list intends and DSTC8 does."""
    return " ".join(word for word in text.split() if word not in (",", "."))


def preparation(protocol: Protocol) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """How a protocol prepares candidates, and how references.

    Args:
        protocol: `coco` nothing; `tvc` ASCII on both sides; `avsd_1ref` the DSTC7 word filter on both sides, meant for
            the one original answer; `avsd7` the same on candidates only, six references; `avsd8` the DSTC8 filter on
            candidates only.
    """
    match protocol:
        case "coco":
            return keep, keep
        case "tvc":
            return ascii_only, ascii_only
        case "avsd_1ref":
            return without_short_words, without_short_words
        case "avsd7":
            return without_short_words, keep
        case "avsd8":
            return without_stops, keep
    raise ValueError(f"protocol: {protocol!r} is none of {', '.join(get_args(Protocol))}")
