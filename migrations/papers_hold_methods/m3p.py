"""M3P: one module trains and fine-tunes, the model is called as the paper, and the miniature's stand-ins moved.

Fine-tuning was a class of its own, `M3PRetrieval`. It is `M3PModule` now, with the weights of all tasks but the match
at zero and what it never used at its defaults.
"""

from __future__ import annotations

import copy
from typing import Any

MOVED = {
    "papers.m3p.module.M3PPretraining": "papers.m3p.module.M3PModule",
    "papers.m3p.module.M3PRetrieval": "papers.m3p.module.M3PModule",
    "papers.m3p.module.WarmStart": "papers.m3p.miniature.WarmStart",
    "papers.m3p.regions.RegionClassifier": "papers.m3p.miniature.RegionClassifier",
    "papers.m3p.regions.RegionPictures": "papers.m3p.miniature.RegionPictures",
}
#: What fine-tuning states now and did not state before.
MATCH_ALONE = {
    "weight_xmlm": 0.0,
    "weight_mlm": 0.0,
    "weight_mrm_class": 0.0,
    "weight_mrm_regression": 0.0,
    "weight_t2i": 1.0,
    "weight_i2t": 1.0,
    "soft_classes": False,
    "alignment_weight": 0.0,
    "itm_weight": 0.0,
    "contrast_weight": 0.0,
    "contrast_temperature": 0.1,
    "position_offset": 2,
}


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an old record as the new code would state it."""
    config = copy.deepcopy(config)
    module = config["model"]
    if module["class_path"] == "papers.m3p.module.M3PRetrieval":
        module["init_args"] |= MATCH_ALONE
    for part in (module, config["data"]):
        part["class_path"] = MOVED.get(part["class_path"], part["class_path"])
    if "model" in module["init_args"]:
        module["init_args"]["model"]["class_path"] = "papers.m3p.model.M3P"
    return config
