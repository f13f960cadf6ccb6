"""XMC-GAN: groups of negatives and of batch statistics are numbers, steps are the unit, and checkpoints are kept.

The records are of one process, where the whole batch was the group of either kind, and of fewer steps than are kept.
"""

from __future__ import annotations

from typing import Any

KEPT = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "dirpath": "$RUN/checkpoints",
        "filename": "step{step:06d}",
        "auto_insert_metric_name": False,
        "every_n_train_steps": 5000,
        "save_top_k": -1,
        "save_weights_only": True,
        "enable_version_counter": False,
    },
}


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as the new code states it."""
    trainer = {"max_steps": -1, **config["trainer"]}
    if trainer["max_epochs"] == 500:  # of a stage that trains nothing
        trainer["max_epochs"] = -1
    if KEPT not in trainer["callbacks"]:
        trainer["callbacks"] = [*trainer["callbacks"], KEPT]
    model, arguments = config["model"], dict(config["model"]["init_args"])
    for part, old, new in (("loss", "negatives", "negatives_group"), ("generator", "batch_norm", "batch_norm_group")):
        if part in arguments:
            own = arguments[part]["init_args"]
            kept = {name: value for name, value in own.items() if name != old}
            arguments[part] = {**arguments[part], "init_args": {new: None, **kept}}
    return {**config, "trainer": trainer, "model": {**model, "init_args": arguments}}
