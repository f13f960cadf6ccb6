"""Commands that only some papers have: exports in other layouts, released checkpoints, generated images."""

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
from common.reporting import records
from common.stages.run import run_stage
from papers.m3p.encoder import M3P, M3PEncoder
from papers.m3p.weights import load_into_model
from tests.m3p.stages import region_network
from tests.stages import request
from tests.xmc_gan.stages import Stages, finished


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


# The encoder of the smoke scale.
SIZES = {
    "vocabulary_size": 1002, "width": 16, "layers": 2, "attention_heads": 2, "feed_forward_width": 32, "positions": 128,
    "languages": 6, "feature_dim": 64,
}  # fmt: skip


def model() -> M3P:
    torch.manual_seed(4)
    return M3P(M3PEncoder(**SIZES), 61)  # type: ignore[arg-type]


def test_a_released_checkpoint_is_exported_and_searched_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    state = {f"model.{name}": value for name, value in model().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    released = tmp_path / "released.pth"
    export = ["export", "m3p", "--checkpoint", str(tmp_path / "last.ckpt"), "--output"]
    assert main([*export, str(released), "--layout", "m3p"]) == 0
    assert main([*export, str(tmp_path / "text.safetensors"), "--layout", "xlm_roberta"]) == 0
    assert main([*export, str(tmp_path / "x.pth"), "--layout", "bert"]) != 0
    assert "valid: m3p, safetensors, torch_export, xlm_roberta" in capsys.readouterr().err
    again = M3P(M3PEncoder(**SIZES), 61)  # type: ignore[arg-type]
    assert load_into_model(again, released) == []

    runs = tmp_path / "runs"
    fit = ["fit", "m3p/zero_shot", "--scale", "smoke", "--runs", str(runs), "--data", str(tmp_path / "none")]
    network = region_network(tmp_path)
    assert main([*fit, "--model.pretrained", str(released), "--data.region_network", str(network)]) == 0
    assert "test/multi30k_en_mr" in capsys.readouterr().out
    (path,) = runs.rglob("record.json")
    record = records.read(path)
    assert 0 <= record.metrics["test/coco_en_mr"] <= 100  # type: ignore[operator]
    assert record.steps == 0
    assert not list(runs.rglob("partial_scores/*"))

    assert main([*fit, "--model.pretrained", str(tmp_path / "none.pth"), "--data.region_network", str(network)]) != 0
    assert "none.pth: no such checkpoint file" in capsys.readouterr().err


CAPTION = "a red circle left and a blue square right on white"


@pytest.fixture(scope="module")
def stages() -> Stages:
    return finished()


def generate(stages: Stages, output: Path, *arguments: str, stage: str = "xmc_gan") -> int:
    checkpoint = str(stages.checkpoint(stage))
    return main(["generate", "xmc_gan", *arguments, "--checkpoint", checkpoint, "--output", str(output)])


def test_generate_writes_png_files(stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(stages, tmp_path, CAPTION, "a purple triangle left of a circle", "--number", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("written to")] == [
        "'a purple triangle left of a circle': the model does not know purple; it learned from a, and, at, black, "
        "blue, circle, gray, green, left, of, on, red, right, square, triangle, white, yellow"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"01-a-red-circle-left-and-a-blue-square-right-on-white-{n}-seed0.png" for n in (1, 2)),
        *(f"02-a-purple-triangle-left-of-a-circle-{n}-seed0.png" for n in (1, 2)),
        "grid.png",
    }
    assert lines[-1] == f"written to {tmp_path / 'grid.png'}"


@pytest.mark.parametrize(
    ("caption", "stage", "message"),
    [
        ("zebra", "xmc_gan", "the model does not know zebra"),
        (CAPTION, "mini_image_network", "makes no images"),
        (CAPTION, "absent", "does not exist: give checkpoints/last.ckpt"),
    ],
)
def test_generate_says_what_is_wrong(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str], caption: str, stage: str, message: str
) -> None:
    assert generate(stages, tmp_path / "out", caption, stage=stage) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stage_is_measured_again_with_what_measured_it(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "xmc_gan/baseline", "--scale", "smoke", "--runs", str(stages.runs)]) == 0
    output = capsys.readouterr().out
    for name, value in stages.records["baseline"].metrics.items():
        assert value is not None
        assert f"{name:<40} {value:.4f}" in output
    assert "test/mini_fd" in output


def test_the_configuration_of_the_paper_names_its_judges(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fit", "xmc_gan/xmc_gan", "--scale", "paper", "--runs", str(tmp_path), "--print_config"]) == 0
    output = capsys.readouterr().out
    assert "# deviation" not in output
    evaluation = yaml.safe_load(output)["model"]["init_args"]["evaluation"]
    assert evaluation["class_path"] == "common.protocols.generation.GenerationEvaluation"
    arguments = evaluation["init_args"]
    assert arguments["inception"].endswith("inception_v3_google-0cc3c7bd.pth")
    expected = {"repeats": 3, "splits": 1, "candidates": 100, "folds": 10, "object_copies": 3, "person_captions": 30000}
    assert {name: arguments[name] for name in expected} == expected
