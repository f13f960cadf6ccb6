"""MCT: heads and loss became parts of the pre-training's configuration."""

from __future__ import annotations

from typing import Any

HEADS = {"heads": "shared", "head_hidden_dim": "hidden_dim", "head_batch_norm": "batch_norm"}
LOSS = (
    "weight_ii", "weight_tag", "weight_cc", "weight_cross", "intra_dim", "inter_dim", "temperature", "inter_loss",
    "margin", "inter_reduction", "temperature_cross", "epsilon", "tag_count", "queue_size", "queue_dtype",
    "queue_warm", "mask_same_image", "seed",
)  # fmt: skip


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a stage as the code after the move states it.

    Args:
        config: merged configuration of before.
    """
    model = config["model"]
    if model["class_path"] != "papers.mct.module.MCT":
        return config
    given = dict(model["init_args"])
    heads = {new: given.pop(old) for old, new in HEADS.items() if old in given}
    heads["shared"] = heads["shared"] == "shared"
    loss = {name: given.pop(name) for name in LOSS if name in given}
    arguments = {
        **given,
        "heads": heads,
        "loss": {"class_path": "papers.mct.loss.MultimodalContrast", "init_args": loss},
    }
    return {**config, "model": {"class_path": "papers.mct.module.MCTModule", "init_args": arguments}}
