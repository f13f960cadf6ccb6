"""AVID-CMA: one module and one loss in place of two each; what was learned is a part of its own, `model.loss`."""

from __future__ import annotations

from typing import Any

#: Old names of the loss's fields that have new ones.
RENAMED = {"cross_weight": "instance_cross", "within_weight": "instance_within"}
#: What AVID's recipes now say of the terms that only CMA had.
AVID = {"within_negatives": None, "positives": 0, "positive_cross": 0.0, "positive_within": 0.0}
MOVED = (
    "negatives", "within_negatives", "positives", "agreement", "instance_cross", "instance_within", "positive_cross",
    "positive_within", "temperature", "bank_momentum", "estimator", "official_quirks", "seed", *RENAMED,
)  # fmt: skip


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of before the move as the new code states it.

    Args:
        config: merged configuration of a stage; not changed.
    """
    name = config["model"]["class_path"].rpartition(".")[2]
    if name not in ("AVID", "CMA"):
        return config
    old = config["model"]["init_args"]
    loss = {RENAMED.get(field, field): old[field] for field in MOVED if field in old}
    if loss.get("within_negatives") == -1:
        loss["within_negatives"] = None
    model = {field: value for field, value in old.items() if field not in MOVED}
    model["loss"] = {
        "class_path": "papers.avid_cma.loss.BankLoss",
        "init_args": {**(AVID if name == "AVID" else {}), **loss},
    }
    return {**config, "model": {"class_path": "papers.avid_cma.module.AVIDModule", "init_args": model}}
