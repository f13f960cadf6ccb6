"""What the machine promises to have, so that tests which need it fail there in place of being skipped."""

from __future__ import annotations

import os


def promised(what: str) -> bool:
    """Whether the variable ASSEMBLE_TESTS_HAVE names it: `browser`, `docs` or `java`."""
    return what in os.environ.get("ASSEMBLE_TESTS_HAVE", "").split()
