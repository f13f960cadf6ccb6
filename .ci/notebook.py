"""Make the tour's notebook out of the tour: `python .ci/notebook.py` writes docs/tour.ipynb. Needs Python alone.

What a command printed stands below it, as in the page: nothing is run here. A test runs the notebook's cells.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOUR, NOTEBOOK = ROOT / "docs" / "tour.md", ROOT / "docs" / "tour.ipynb"
#: Relative links and paths are those of the repository's top, wherever the notebook was opened.
START = """\
import os
from pathlib import Path

os.chdir(next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "configs").is_dir()))"""
BLOCK = re.compile(r"```(bash|python|text)\n(.*?)```", re.DOTALL)


def command(line: str) -> str:
    """A line of a shell as a line of a notebook."""
    if line.startswith("make setup"):
        return "# make setup: before the notebook is opened, in a shell"
    if found := re.fullmatch(r"export (\w+)=\$PWD/(\S+)", line):
        return f'os.environ["{found[1]}"] = os.path.abspath("{found[2]}")'
    return f"!{line}"


def notebook(text: str) -> dict[str, Any]:
    """The notebook of a page: prose as it is, shell and Python as cells, and what was printed as their output."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, source: str) -> None:
        if source.strip():
            own = {"execution_count": None, "outputs": []} if kind == "code" else {}
            lines = source.strip().splitlines(keepends=True)
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, **own, "source": lines})

    place = 0
    for block in BLOCK.finditer(text):
        add("markdown", text[place : block.start()])
        if place == 0:
            add("code", START)
        place = block.end()
        if block[1] == "text":
            before = next(cell for cell in reversed(cells) if cell["cell_type"] == "code")
            printed = block[2].splitlines(keepends=True)
            before["outputs"].append({"output_type": "stream", "name": "stdout", "text": printed})
        elif block[1] == "bash":
            add("code", "\n".join(map(command, block[2].splitlines())))
        else:
            add("code", block[2])
    add("markdown", text[place:])
    language = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": language}, "nbformat": 4, "nbformat_minor": 5}


def written() -> str:
    """The notebook's file, as it has to be."""
    pointer = re.compile(r"This page is also a \[notebook\].*?\n\n", re.DOTALL)
    text = pointer.sub("", TOUR.read_text(encoding="utf-8"), count=1)
    return json.dumps(notebook(text), ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(written(), encoding="utf-8")
