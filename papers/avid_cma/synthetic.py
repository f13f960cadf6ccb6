"""What stands for the paper where a step is measured, and in the places of its files."""

from typing import Any

RECIPE = "avid"
WITHOUT_FILES: dict[str, Any] = {}
