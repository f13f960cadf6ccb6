"""Import a paper's optional modules."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from common.errors import StageError

if TYPE_CHECKING:
    from common.models.trained import TrainedModel


def optional_part(paper: str, name: str) -> Any:
    """Import `papers.<paper>.<name>`, or return None if the paper has no such file."""
    path = f"papers.{paper}.{name}"
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


def trained_model(paper: str) -> type[TrainedModel]:
    """Return the class of a paper's trained models."""
    model: type[TrainedModel] = part(paper, "use", "has no trained models to use").MODEL
    return model


def part(paper: str, name: str, without: str) -> Any:
    module = optional_part(paper, name)
    if module is None:
        raise StageError(f"{paper} {without}: it has no {name}.py (CONTRIBUTING.md, Add a paper)")
    return module
