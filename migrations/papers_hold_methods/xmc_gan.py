"""XMC-GAN: the LightningModule is called XMCGANModule, and what the losses need stands in `model.loss`."""

from __future__ import annotations

from typing import Any

#: Fields of the model that the loss has now.
LOSS = (
    "weight_sentence",
    "weight_word",
    "weight_image_d",
    "weight_image_net",
    "temperature",
    "word_gammas",
    "negatives",
    "captions_at_once",
)


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as the new code states it."""
    model = config["model"]
    if model["class_path"].rpartition(".")[2] != "XMCGAN":  # what trains a stand-in or measures real images
        return config
    arguments = {name: value for name, value in model["init_args"].items() if name not in LOSS}
    arguments["loss"] = {
        "class_path": "papers.xmc_gan.loss.XMCGANLoss",
        "init_args": {name: model["init_args"][name] for name in LOSS},
    }
    return {**config, "model": {"class_path": "papers.xmc_gan.module.XMCGANModule", "init_args": arguments}}
