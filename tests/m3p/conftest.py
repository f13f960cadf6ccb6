"""Write tiny data sets once for all tests of a module."""

from __future__ import annotations

import pytest

from tests.m3p.layouts import Layouts


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    return Layouts.write(tmp_path_factory.mktemp("layouts"), images=12)
