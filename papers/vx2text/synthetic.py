"""What VX2TEXT is measured by where there is no data: a recipe, and what stands in the places of files."""

from __future__ import annotations

from typing import Any

#: The recipe that stands for the paper where one is measured.
RECIPE = "avsd"
WITHOUT_FILES: dict[str, Any] = {
    "model.text_pretrained": None,
    "model.video_pretrained": None,
    "model.audio_pretrained": None,
    "model.meteor": False,
    "model.model.audio_classifier.categories": [f"sound {number}" for number in range(527)],  # as many as AudioSet has
}
