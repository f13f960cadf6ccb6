"""MCT: the supervised network and VirTex say how many images are normalized together; the records saw whole batches."""

from __future__ import annotations

from typing import Any

#: Their modules have moved since.
TRAINED = ("VirTex", "SupervisedClassification")


def migrate(paper: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an old record as the new code states it.

    Args:
        paper: package of the paper.
        config: merged configuration, plain data; left as it is.
    """
    model = config["model"]
    if paper != "mct" or str(model["class_path"]).rpartition(".")[2] not in TRAINED:
        return config
    return {**config, "model": {**model, "init_args": {"batch_norm_group": None, **model["init_args"]}}}
