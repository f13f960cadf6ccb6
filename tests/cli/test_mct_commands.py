"""The commands of MCT as a user calls them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from common.commands.main import main
from common.stages.run import run_stage
from tests.stages import request


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage = request("mct/moco_v2", tmp_path_factory.mktemp("runs"))
    run_stage(stage)
    return stage.directory / "checkpoints" / "last.ckpt"


def export(checkpoint: Path, output: Path, *layout: str) -> int:
    return main(["export", "mct", "--checkpoint", str(checkpoint), "--output", str(output), *layout])


def test_export_in_the_layouts_of_other_libraries(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    prefix = "model.image.backbone."
    trained = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    assert export(checkpoint, tmp_path / "named.pth", "--layout", "torchvision") == 0
    assert f"written to {tmp_path / 'named.pth'}" in capsys.readouterr().out
    assert export(checkpoint, tmp_path / "timm.safetensors", "--layout", "timm") == 0
    for found in (
        torch.load(tmp_path / "named.pth", weights_only=True),
        load_file(tmp_path / "timm.safetensors"),
    ):
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], value) for name, value in trained.items())

    assert export(checkpoint, tmp_path / "d2.pkl", "--layout", "detectron2") == 0
    content = pickle.loads((tmp_path / "d2.pkl").read_bytes())
    assert content["matching_heuristics"] is True
    assert content["__author__"]
    assert len(content["model"]) == len(trained)
    np.testing.assert_array_equal(content["model"]["stem.conv1.weight"], trained["conv1.weight"])
    np.testing.assert_array_equal(content["model"]["res2.0.conv1.weight"], trained["layer1.0.conv1.weight"])


def test_images_and_captions_are_not_compared_by_encoders_that_never_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = request("mct/intra_only", tmp_path / "runs")
    run_stage(stage)
    found = ["retrieve", "mct", "--checkpoint", str(stage.directory / "checkpoints" / "last.ckpt")]
    (tmp_path / "texts.txt").write_text("a red circle\ntwo stars\n", encoding="utf-8")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (40, 40), "red").save(pictures / "red.png")
    for query, among in (("a circle", pictures), (str(pictures / "red.png"), tmp_path / "texts.txt")):
        assert main([*found, "--query", query, "--among", str(among)]) == 2
        assert "embeddings were trained inside each modality alone; give the checkpoint" in capsys.readouterr().err
    for query, among in (("a circle", tmp_path / "texts.txt"), (str(pictures / "red.png"), pictures)):
        assert main([*found, "--query", query, "--among", str(among)]) == 0
    # Nor does the card of the exported model show how.
    assert main(["export", "mct", "--checkpoint", found[3], "--output", str(tmp_path / "given")]) == 0
    card = (tmp_path / "given" / "README.md").read_text(encoding="utf-8")
    assert 'model.embed_image("picture.jpg") @ model.embed_image("another.jpg").T' in card
    assert "embed_text" not in card


def test_the_configuration_of_the_paper_has_its_values(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fit", "mct/mct_tag", "--scale", "paper", "--runs", str(tmp_path), "--print_config"]) == 0
    output = capsys.readouterr().out
    assert "# deviation" not in output
    model = yaml.safe_load(output)["model"]["init_args"]
    expected = {
        "weight_tag": 1.0, "weight_cross": 20.0, "intra_dim": 128, "inter_dim": 1024, "temperature": 0.07,
        "margin": 0.2, "queue_size": 65536, "queue_warm": "random", "inter_reduction": "mean",
    }  # fmt: skip
    assert {name: model["loss"]["init_args"][name] for name in expected} == expected
    assert model["momentum"] == 0.999
