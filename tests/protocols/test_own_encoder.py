"""Run the commands and the code of docs/own-encoder.md and docs/library.md at a small size."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from assemble.commands.main import main
from assemble.reporting.papers import existing_papers, project_root
from assemble.reporting.records import find
from common.data.rehearsal import write_random_voc
from common.protocols.detection import BoxTransform

TEXT = (project_root() / "docs" / "own-encoder.md").read_text(encoding="utf-8").replace("mini", "smoke")


PAPERS = {paper.short for paper in existing_papers()}
BIN = Path(sys.executable).parent


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
    layer, _ = blocks("yaml")
    (tmp_path / "own.yaml").write_text(layer, encoding="utf-8")
    assert main(["fit", "mct/imagenet_linear", "--scale", "smoke", "--config", "own.yaml", *runs]) == 0
    # Both runs use the same encoder from the same file, configured in two ways.
    one, other = find(tmp_path / "runs")
    assert one.metrics == other.metrics
    assert one.metrics["test/images"] == 48
    space: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, space)
    (found,) = ({name.split("/dataloader")[0]: value for name, value in row.items()} for row in space["results"][:1])
    assert found["test/images"] == 12
    assert found["test/top1"] > 50


def test_the_workflow_trains_a_class_of_its_repository(tmp_path: Path) -> None:
    _, text = blocks("yaml")
    assert len(text.splitlines()) <= 20
    (job,) = yaml.safe_load(text)["jobs"].values()
    inputs = job["steps"][-1]["with"]
    action = yaml.safe_load((project_root() / "action.yml").read_text(encoding="utf-8"))
    assert inputs.keys() <= action["inputs"].keys()
    assert all(name in PAPERS for name in inputs["papers"].split())
    encoder = tmp_path / "my_package" / "encoder.py"
    encoder.parent.mkdir()
    encoder.write_text("from torch import nn\nclass Encoder(nn.Flatten):\n    feature_dim = 3072\n", encoding="utf-8")
    train = action["runs"]["steps"][-1]["run"].replace(
        "--scale smoke", f"--scale smoke --runs {tmp_path} --print_config"
    )
    variables = {"FIT": inputs["fit"], "GITHUB_WORKSPACE": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", train],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "class_path: my_package.encoder.Encoder" in done.stdout


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
