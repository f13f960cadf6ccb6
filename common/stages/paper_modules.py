"""A paper's optional modules."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from common.errors import StageError


def optional_part(paper: str, name: str) -> Any:
    """The module `papers.<paper>.<name>`, or None if the paper has no such file."""
    path = f"rehearsals.{paper}" if name == "rehearsal" else f"papers.{paper}.{name}"
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


def part(paper: str, name: str, without: str) -> Any:
    found = optional_part(paper, name)
    if found is None:
        raise StageError(f"{paper} {without}: it has no {name}.py (CONTRIBUTING.md, Add a paper)")
    return found
