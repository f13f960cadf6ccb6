"""The commands and the code of docs/own-encoder.md and docs/library.md, run as they stand there, at a small size."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from assemble.commands.main import main
from assemble.reporting.papers import project_root
from assemble.reporting.records import find
from common.data.rehearsal import write_random_voc
from common.protocols.detection import BoxTransform

TEXT = (project_root() / "docs" / "own-encoder.md").read_text(encoding="utf-8").replace("mini", "smoke")


def blocks(kind: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


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


def test_the_snippets_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_random_voc(tmp_path / "voc", "2007", trainval=4, test=2)
    text = (project_root() / "docs" / "library.md").read_text(encoding="utf-8")
    *snippets, detection = blocks("python", text)
    assert len(snippets) == 4
    for snippet in snippets:
        exec(snippet, {})
    small = detection.replace("data/voc", "voc").replace("ImageResNet()", "ImageResNet(channels=(4, 8, 16, 32))")
    space: dict[str, Any] = {"BoxTransform": BoxTransform}
    exec(small.replace("batch_size=2", "batch_size=2, image=BoxTransform(sizes=(96,), test_size=96)"), space)
    assert space["trainer"].callback_metrics["test/images"] == 2
    assert "'cider'" in capsys.readouterr().out
