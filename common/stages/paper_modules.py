"""A paper's optional files, and checks for them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from common.errors import StageError

#: Files of an export.
CONFIGURATION, CARD = "config.json", "README.md"


def _module(paper: str, name: str) -> str:
    return f"rehearsals.{paper}" if name == "rehearsal" else f"papers.{paper}.{name}"


def has_part(paper: str, name: str) -> bool:
    """Whether a module `papers.<paper>.<name>` exists, without importing it."""
    return importlib.util.find_spec(_module(paper, name)) is not None


def optional_part(paper: str, name: str) -> Any:
    """The module `papers.<paper>.<name>`, or None if the paper has no such file."""
    return importlib.import_module(_module(paper, name)) if has_part(paper, name) else None


#: File of a paper's trained models, and the error without it.
TRAINED = ("use", "has no trained models to use")


def part(paper: str, name: str, without: str) -> Any:
    """The module `papers.<paper>.<name>`."""
    found = optional_part(paper, name)
    if found is None:
        file = _module(paper, name).replace(".", "/")
        raise StageError(f"{paper} {without}: {file}.py does not exist (CONTRIBUTING.md, Add a paper)")
    return found
