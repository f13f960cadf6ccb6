"""Provide a logger that keeps all it receives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger


class Kept(WandbLogger):
    """A logger of Weights & Biases that keeps all it receives."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
        self.videos: dict[str, tuple[list[str], list[str]]] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert all(Path(image).is_file() for image in images)
        self.images.append(key)

    def log_table(self, key: str, columns: Any = None, data: Any = None, *args: Any, **kwargs: Any) -> None:
        self.tables[key] = (columns, data)

    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.videos[key] = (videos, kwargs["caption"])
