"""Published recipes: fields that the recipes gained when paper scale was compared with the official code line by line.

One module for each paper, with `migrate(config)`: every new field with the value under which the record was measured.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def migrate(paper: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an old record as the new code states it.

    Args:
        paper: package of the paper.
        config: merged configuration, plain data; left as it is.
    """
    name = f"{__name__}.{paper}"
    if importlib.util.find_spec(name) is None:
        return config
    new: dict[str, Any] = importlib.import_module(name).migrate(config)
    return new
