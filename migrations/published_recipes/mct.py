"""MCT: images that batch normalization sees together are a number, and VOC07 goes by the protocol of VirTex v0.9."""

from __future__ import annotations

from typing import Any


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """Miniatures saw whole batches, on one device and in one group, and their machines images of their own aspect."""
    model, data = config["model"], config["data"]
    arguments, source = dict(model.get("init_args") or {}), dict(data.get("init_args") or {})
    if arguments.pop("key_bn_groups", None) == 1:
        arguments["batch_norm_group"] = None
    if str(model.get("class_path")).endswith(".MultiLabelSVM"):
        source["image"] = {"squeeze": False, **source["image"]}
    return {**config, "model": {**model, "init_args": arguments}, "data": {**data, "init_args": source}}
