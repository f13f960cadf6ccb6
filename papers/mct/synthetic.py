"""What estimates and measurements without data take of this paper."""

from __future__ import annotations

from typing import Any

#: The recipe that stands for the paper where one is measured.
RECIPE = "mct"
#: Fields that name files, and what stands in their places.
WITHOUT_FILES: dict[str, Any] = {"model.text_encoder.pretrained": None}
