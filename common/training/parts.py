"""The files that a paper has or has not, beside those that it needs to be trained."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from common.training.errors import StageError


def optional_part(paper: str, name: str) -> Any:
    """The module `papers.<paper>.<name>`, or None where the paper has no such file.

    Args:
        paper: package of the paper.
        name: file without its suffix.
    """
    full = f"papers.{paper}.{name}"
    return importlib.import_module(full) if importlib.util.find_spec(full) else None


def part(paper: str, name: str, without: str) -> Any:
    """The module `papers.<paper>.<name>`.

    Args:
        paper: package of the paper.
        name: file without its suffix.
        without: what the paper is or cannot do without it, as `cannot be rehearsed`; stands in the message.

    Raises:
        StageError: the paper has no such file.
    """
    found = optional_part(paper, name)
    if found is None:
        raise StageError(f"{paper} {without}: papers/{paper}/{name}.py does not exist (CONTRIBUTING.md, Add a paper)")
    return found
