"""Fixtures for the data tests: rendered worlds that several files share, and a separate cache folder for a test."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache as cached
from pathlib import Path
from typing import Any

import pytest

from common.data.worlds.base import World
from tests.data.worlds import as_it_was, tiny


@pytest.fixture(scope="session")
def rendered() -> Callable[[type[World]], Any]:
    """Return a function that renders a kind's small world once and checks it. Tests must not change the world."""

    @cached
    def of(kind: type[World]) -> Any:
        return as_it_was(tiny(kind, Path(os.environ["ASSEMBLE_TESTS"]) / "worlds"))

    return of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty cache folder, and let the cache trust new files at once instead of after a few seconds."""
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("common.files.SETTLED_SECONDS", 0.0)
    return tmp_path / "cache"
