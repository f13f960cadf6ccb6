"""What stands for XMC-GAN where it is estimated or measured without data."""

from __future__ import annotations

from typing import Any

#: The recipe that stands for the paper where one is measured.
RECIPE = "xmc_gan"
WITHOUT_FILES: dict[str, Any] = {"model.image_network.pretrained": None, "model.evaluation": None}
