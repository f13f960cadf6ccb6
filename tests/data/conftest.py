"""Worlds that several test files read, rendered once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from common.data.worlds.base import World
from tests.data.worlds import tiny


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[World]], Any]:
    """The small world of a kind with all its files; nobody changes them."""

    @cache
    def of(kind: type[World]) -> Any:
        made = tiny(kind, tmp_path_factory.mktemp("worlds"))
        made.prepare()
        return made

    return of
