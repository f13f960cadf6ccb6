"""M3P: when the weights move, which weights are tested, and how text and captions are read are settings.

The records were measured with one update for all losses of an iteration, with the last weights, with one language for
all rows of a block of text, with test captions cut like those of training, and with words looked up without marks
around them and in lower case.
"""

from __future__ import annotations

import copy
from typing import Any

MODULE = "papers.m3p.module.M3PModule"
#: Fields of one of the data modules.
DATA: dict[str, dict[str, Any]] = {
    "papers.m3p.data.PretrainingData": {"text_groups": 1, "validation_items": None},
    "papers.m3p.data.RetrievalData": {"validation_items": 1224},
}


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an old record as the new code would state it."""
    config = copy.deepcopy(config)
    trainer, model = config["trainer"], config["model"]
    trainer.setdefault("max_steps", -1)
    if model["class_path"] == MODULE:
        arguments = model["init_args"]
        clipped, cycle = trainer.pop("gradient_clip_val", 5.0), trainer.pop("accumulate_grad_batches", 1)
        for name, value in {"updates": "per_cycle", "accumulate": cycle, "clip_norm": clipped}.items():
            arguments.setdefault(name, value)
        arguments.setdefault("selection", "last")
        arguments.setdefault("select_every", 3125)
    data = config["data"]
    if data["class_path"] in DATA:
        for name, value in {"cut_test_captions": True, "validation_split": None, **DATA[data["class_path"]]}.items():
            data["init_args"].setdefault(name, value)
        switcher = data["init_args"].get("code_switching")
        if switcher is not None:
            for name in ("strip_punctuation", "lower_case"):
                switcher["init_args"].setdefault(name, True)
    return config
