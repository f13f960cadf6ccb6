"""AVID-CMA: batch statistics in groups, listings of clips that sound, no checkpoint amid AVID, squeezed probe frames.

What the miniature measured stays what it was: its batches of 32 are one group, its clips all sound and its frames are
square.
"""

from __future__ import annotations

import copy
from typing import Any

_COMMON_SECONDS = {"Kinetics400": 3.0, "AudioSet": 2.1}


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an old record with the new fields; see the package.

    Args:
        config: left as it is.
    """
    config = copy.deepcopy(config)
    config["model"]["init_args"].setdefault("batch_norm_group", 32)
    data = config["data"]["init_args"]
    kind = data["dataset"]["class_path"].rpartition(".")[2]
    if kind in _COMMON_SECONDS:
        data["dataset"]["init_args"].setdefault("common_seconds", _COMMON_SECONDS[kind])
    if data.get("video", {}).get("mode") == "crop":
        data["video"]["keep_aspect"] = False
    trainer = config["trainer"]
    trainer["callbacks"] = [one for one in trainer["callbacks"] if one.get("init_args", {}).get("every_n_epochs") != 10]
    return config
