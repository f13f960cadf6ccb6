"""What is measured where a paper is, and what stands in for its files."""

from __future__ import annotations

from typing import Any

#: The recipe that stands for the paper where one is measured.
RECIPE = "m3p"
WITHOUT_FILES: dict[str, Any] = {"model.pretrained": None}
