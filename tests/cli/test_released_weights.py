"""Run the commands of docs/released-weights.md at the smoke scale, on weights in the released layouts."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from assemble.commands.main import main
from assemble.reporting.papers import project_root
from common.encoders.checkpoint_files import below, read_checkpoint
from papers.m3p.weights import export
from tests.m3p.stages import region_network
from tests.trained import checkpoint

PAGE = (project_root() / "docs" / "released-weights.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith(".venv/bin/assemble fit")
]


def state_of(paper: str) -> dict[str, Tensor]:
    return dict(read_checkpoint(checkpoint(paper))["state_dict"])


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + name: value.clone() for name, value in below(state, old).items()}


def write_released(folder: Path, name: str) -> Path:
    """Write a file in a released layout with the weights of one of our tiny models."""
    path = folder / name
    if name == "avid.pth.tar":
        content = {"epoch": 400, "model": renamed(state_of("avid_cma"), "model.", "module."), "train_criterion": {}}
    elif name == "moco.pth.tar":
        backbone = renamed(state_of("mct"), "model.image.backbone.", "module.encoder_q.")
        content = {"epoch": 200, "arch": "resnet50", "state_dict": backbone}
    elif name == "virtex.pth":
        content = {"model": renamed(state_of("mct"), "model.image.backbone.", "visual.cnn."), "iteration": 500_000}
    else:
        assert name == "m3p.pth"
        return export(checkpoint("m3p"), path, "m3p")
    torch.save(content, path)
    return path


def weights(line: str) -> tuple[str, str]:
    """Return the model field that a command sets to a file of weights, and the file's path."""
    words = shlex.split(line)
    (place,) = (k for k, word in enumerate(words) if word in ("--model.pretrained", "--model.warm_start"))
    return words[place].removeprefix("--model."), words[place + 1]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_published_recipe_has_every_field_of_the_command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)
    assert words[0] == ".venv/bin/assemble"
    assert words[3:7] == ["--scale", "paper", "--data", "/data"]
    assert main([*words[1:], "--print_config"]) == 0
    assert "{}: {}".format(*weights(line)) in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in COMMANDS if weights(line)[0] == "pretrained"])
def test_a_released_file_goes_into_its_protocol(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, (_, file) = shlex.split(line), weights(line)
    written = write_released(tmp_path, file)
    # Write the statistics of the tiny spectrogram.
    np.savez(tmp_path / "norm.npz", mean=np.full(65, -30.0, np.float32), std=np.full(65, 20.0, np.float32))
    places = {
        "/data": str(tmp_path / "data"),
        "paper": "smoke",
        file: str(written),
        "norm.npz": str(tmp_path / "norm.npz"),
    }
    given = [places.get(word, word) for word in words[1:]]
    if "m3p/" in line:
        given += ["--data.region_network", str(region_network(tmp_path))]
    monkeypatch.chdir(tmp_path)
    assert main([*given, "--runs", str(tmp_path / "runs")]) == 0, capsys.readouterr().err
    (record,) = (tmp_path / "runs").rglob("record.json")
    found = json.loads(record.read_bytes())
    assert found["metrics"]
    assert all(name.startswith("test/") for name in found["metrics"])


def test_a_released_file_stands_for_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_released(tmp_path, "avid.pth.tar")
    monkeypatch.chdir(tmp_path)
    flags = ["--scale", "smoke", "--stages", "esc@avid", "--given", f"avid={file}", "--runs", str(tmp_path / "runs")]
    assert main(["reproduce", "avid", *flags]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "AVID-CMA at scale smoke: 2 stages, 1 given, 0 done, 1 to run" in out
    (path,) = (tmp_path / "runs").rglob("record.json")
    assert path.parent == tmp_path / "runs" / "avid_cma" / "smoke" / "seed0-given" / "esc@avid"
    found = json.loads(path.read_bytes())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["given"] == {"avid": {"file": "avid.pth.tar", "sha256": digest}}
    # Neither the released file nor another file in its folder has the statistics, so the stage computed them.
    assert {name: parent["digest"] for name, parent in found["parents"].items()} == {
        "model.init_args.pretrained": digest
    }
    # The number of SVMs that a stage fits in parallel changes neither the stage's hash nor its numbers.
    assert (
        main(["fit", "avid/esc@avid", *flags[:2], *flags[4:6], "--runs", str(tmp_path / "two"), "--model.jobs", "2"])
        == 0
    )
    again = json.loads((tmp_path / "two" / path.relative_to(tmp_path / "runs")).read_bytes())
    assert [again[name] for name in ("metrics", "lineage_hash")] == [
        found[name] for name in ("metrics", "lineage_hash")
    ]
    # Without the file, the plan trains the pre-training stage, and the run with the file stays as it is.
    assert main(["plan", "avid", *flags[:4], *flags[6:]]) == 0
    assert "run  seed 0  avid" in capsys.readouterr().out
    assert main(["plan", "avid", *flags]) == 0
    assert "done   seed 0  esc@avid" in capsys.readouterr().out
    # A damaged byte changes a weight without changing names and shapes.
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    assert main(["reproduce", "avid", *flags]) == 2
    assert "damaged, the checksum of its part" in capsys.readouterr().err
