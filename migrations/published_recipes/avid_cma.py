"""AVID-CMA: limits of listing and skipping that a world, whose clips are whole, never meets."""

from __future__ import annotations

import copy
from typing import Any


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of before as the code now states it.

    Args:
        config: merged configuration of a stage; not changed.
    """
    config = copy.deepcopy(config)
    model = config["model"]["class_path"].rpartition(".")[2]
    data = config["data"]["init_args"]
    if model == "AVIDModule":
        data["max_skipped_fraction"] = 1.0
    if model == "LinearProbes":
        data["dataset"]["init_args"]["common_seconds"] = 1.5
    return config
