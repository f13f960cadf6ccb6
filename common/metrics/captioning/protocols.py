"""What each benchmark does to captions before tokenizing. Source: docs/papers/vx2text.md [11] (protocols, traps)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

Protocol = Literal["coco", "tvc", "avsd_1ref", "avsd7", "avsd8"]


def ascii_only(text: str) -> str:
    """Every non-ASCII character as one space, ends stripped."""
    return re.sub(r"[^\x00-\x7f]", " ", text).strip()


def without_short_words(text: str) -> str:
    """Without the words of exactly one character, such as `a`, `i` and `2`.

    The official DSTC7 stop-word list uses a full stop as a regular expression, so it matches any character. The
    published numbers have this defect.
    """
    return " ".join(word for word in text.split() if len(word) != 1)


def without_stops(text: str) -> str:
    """Without the words `,` and `.`, as the stop-word list intends and DSTC8 does."""
    return " ".join(word for word in text.split() if word not in (",", "."))


def preparation(protocol: Protocol) -> tuple[Callable[[str], str], ...]:
    """How a protocol prepares candidates, and how references."""
    prepared: dict[Protocol, tuple[Callable[[str], str], ...]] = {
        "coco": (str, str),
        "tvc": (ascii_only, ascii_only),
        "avsd_1ref": (without_short_words, without_short_words),  # the reference is the one original answer
        "avsd7": (without_short_words, str),  # six references
        "avsd8": (without_stops, str),
    }
    return prepared[protocol]
