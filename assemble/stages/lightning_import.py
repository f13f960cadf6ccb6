"""Imports Lightning without packages that torchmetrics only needs for unused metrics and plots."""

from __future__ import annotations

import gc
import importlib
import re
import sys

LEFT_OUT = frozenset({"matplotlib", "scipy", "torchvision", "transformers"})


def import_lightning() -> None:
    """Import `lightning.pytorch` in half the time, hiding the packages of `LEFT_OUT`."""
    if "torchmetrics" in sys.modules:
        importlib.import_module("lightning.pytorch")
        return
    from lightning_utilities.core import imports

    met, there = imports.RequirementCache.__bool__, imports.package_available

    def is_met(requirement: imports.RequirementCache) -> bool:
        return re.split("[<>=! ]", requirement.requirement or "")[0] not in LEFT_OUT and met(requirement)

    imports.RequirementCache.__bool__ = is_met  # type: ignore[method-assign, assignment]
    imports.package_available = lambda name: name not in LEFT_OUT and there(name)  # type: ignore[assignment]
    gc.disable()  # modules stay loaded, so looking for garbage among them would only take a fifth of the time
    try:
        importlib.import_module("lightning.pytorch")
    finally:
        gc.enable()
        imports.RequirementCache.__bool__ = met  # type: ignore[method-assign]
        imports.package_available = there
    # Let the garbage collector skip modules, which stay loaded.
    gc.freeze()
