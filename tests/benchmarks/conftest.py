"""Skip the benchmarks except under `make bench`, which sets `BENCH` to a page for the table, or to 1 for no page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from assemble.reporting.render import marked, write
from tests.benchmarks.speed import LINES, markdown

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("BENCH"):
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="run by make bench"))


def pytest_sessionfinish(exitstatus: int) -> None:
    if not LINES:
        return
    table, page = markdown(LINES), os.environ["BENCH"]
    print(f"\n\n{table}\n")
    if page != "1":
        write({Path(page): marked(Path(page), speed=table)})
        print(f"written to {page}" + ("; something failed, see above" if exitstatus else ""))
