"""The commands and the code of docs/own-encoder.md, run as they stand there, at the smoke scale."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.commands.main import main
from common.reporting.papers import project_root
from common.reporting.records import find

TEXT = (project_root() / "docs" / "own-encoder.md").read_text(encoding="utf-8").replace("mini", "smoke")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = ["--runs", str(tmp_path / "runs")]
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    for line in lines:
        words = shlex.split(line)
        if words[0] == ".venv/bin/assemble":
            assert main([*words[1:], *runs]) == 0, line
        elif words[0] == ".venv/bin/python":
            exec(words[2], {})
        else:
            subprocess.run(words, check=True)
    (yaml,) = blocks("yaml")
    (tmp_path / "own.yaml").write_text(yaml, encoding="utf-8")
    assert main(["fit", "mct/imagenet_linear", "--scale", "smoke", "--config", "own.yaml", *runs]) == 0
    # The same encoder from the same file, given in two ways.
    one, other = find(tmp_path / "runs")
    assert one.metrics == other.metrics
    assert one.metrics["test/images"] == 48
    space: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, space)
    (found,) = ({name.split("/dataloader")[0]: value for name, value in row.items()} for row in space["results"][:1])
    assert found["test/images"] == 12
    assert found["test/top1"] > 50
