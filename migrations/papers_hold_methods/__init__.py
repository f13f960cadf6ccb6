"""Papers hold methods: fields and classes that moved when the papers were cut down to what they invented.

One module for each paper, with `migrate(config)`: the configuration of an old record as the new code would state it.
Fields that have other names in all papers are listed here. Nothing about the experiments changed, so what was measured
stays; the records keep their old hashes beside the new.

`python -m migrations papers_hold_methods [FOLDER ...]` rewrites records.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

RENAMED = {
    "held_out_share": "held_out_fraction",
    "lr_final_share": "lr_final_fraction",
    "max_skipped_share": "max_skipped_fraction",
    "normalise_features": "normalize_features",
    "standardise_epsilon": "standardize_epsilon",
    "text_share": "text_fraction",
    "warmup_share": "warmup_fraction",
}


def migrate(paper: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an old record as the new code states it.

    Args:
        paper: package of the paper.
        config: merged configuration, plain data; left as it is.
    """
    name = f"{__name__}.{paper}"
    if importlib.util.find_spec(name) is not None:
        config = importlib.import_module(name).migrate(config)
    moved: dict[str, Any] = _renamed(config)
    return moved


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED.get(key, key): _renamed(item) for key, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value
