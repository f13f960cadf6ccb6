"""Lightning, imported without what it only has for others."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: What torchmetrics imports where it is installed, for metrics and plots that no stage asks of it.
LEFT_OUT = frozenset({"matplotlib", "scipy", "transformers"})


def import_lightning() -> None:
    """Import `lightning.pytorch` in less time than it takes by itself.

    Lightning imports torchmetrics, and that every package for which it has a metric. Those of `LEFT_OUT` look absent
    meanwhile; who needs one imports it as ever. Where torchmetrics was imported before, nothing is left out: so a class
    of one's own that wants its BERTScore, or the `plot` of its metrics, finds them in a script, not in a stage.
    """
    if "torchmetrics" in sys.modules:
        importlib.import_module("lightning.pytorch")
        return
    with _looking_absent():
        importlib.import_module("lightning.pytorch")
    # Modules stay: what looks for memory to free, after every stage, need not look through them again.
    gc.freeze()


@contextmanager
def _looking_absent() -> Iterator[None]:
    from lightning_utilities.core import imports

    met, there = imports.RequirementCache.__bool__, imports.package_available

    def is_met(requirement: imports.RequirementCache) -> bool:
        name = (requirement.requirement or "").partition(">")[0].partition("<")[0].partition("=")[0]
        return name.strip() not in LEFT_OUT and met(requirement)

    def is_there(name: str) -> bool:
        return name not in LEFT_OUT and there(name)

    imports.RequirementCache.__bool__ = is_met  # type: ignore[method-assign, assignment]
    imports.package_available = is_there  # type: ignore[assignment]
    try:
        yield
    finally:
        imports.RequirementCache.__bool__ = met  # type: ignore[method-assign]
        imports.package_available = there
