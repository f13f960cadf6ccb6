"""Test backbones from released checkpoints and ours, and the export under the released names for other libraries."""

from __future__ import annotations

import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from assemble.stages.configuration import resolve
from common.encoders.checkpoint_files import load_encoder
from common.encoders.image import ImageResNet
from papers.mct.networks import Tower
from papers.mct.weights import detectron2_name, export, load_backbone
from tests.encoders.test_checkpoint_files import network, saved, state_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mct" / "ckpt_layout.json").read_text(encoding="utf-8"))
MOCO, VIRTEX = GOLDEN["moco_v2_resnet50"], GOLDEN["virtex_bicaptioning_R50_L1_H1024"]
# (torchvision's name, detectron2's name, shape) of every tensor of a ResNet-50 without classifier.
RESNET50 = [(ours, theirs, shape) for _, ours, theirs, shape in MOCO["rows"] if ours is not None]


def filled(shape: list[int], value: float = 1.0) -> Tensor:
    """Make a tensor of any size that takes only four bytes in memory and in a file."""
    return torch.full((1,) * len(shape), float(value)).expand(shape) if shape else torch.tensor(int(value))


def moco(**changes: Any) -> dict[str, Any]:
    """Make a checkpoint in the released layout. Tensor i holds i in the query encoder, -i in the momentum encoder."""
    state = {name: filled(shape, position) for position, (name, _, _, shape) in enumerate(MOCO["rows"])}
    state |= {
        name.replace("encoder_q", "encoder_k"): filled(shape, -position)
        for position, (name, _, _, shape) in enumerate(MOCO["rows"])
    }
    state["module.queue"] = torch.arange(128 * 64.0).view(128, 64)
    state["module.queue_ptr"] = torch.tensor([5])
    optimizer = {"state": {}, "param_groups": [{"lr": 0.03}]}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state | changes, "optimizer": optimizer}


def virtex() -> dict[str, Any]:
    model = {name: filled(shape, position) for position, (name, _, _, shape) in enumerate(VIRTEX["visual"])}
    model |= {name: filled(shape, 0.5) for name, shape in VIRTEX["text"].items()}
    return {"model": model, "optimizer": {}, "scheduler": {}, "scaler": {}, "iteration": 500_000}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def moco_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("moco") / "moco_v2_200ep_pretrain.pth.tar", moco())


# -- released files ----------------------------------------------------------------------------------------------------


def test_moco_backbone_has_every_name_and_shape(moco_file: Path) -> None:
    backbone = load_backbone(moco_file)
    assert {name: list(value.shape) for name, value in backbone.items()} == {ours: s for ours, _, s in RESNET50}
    for position, (_, ours, _, _) in enumerate(MOCO["rows"]):
        assert ours is None or backbone[ours].flatten()[0] == position


def test_virtex(tmp_path: Path) -> None:
    path = saved(tmp_path / "bicaptioning_R_50_L1_H1024.pth", virtex())
    expected = {ours: shape for _, ours, _, shape in VIRTEX["visual"]}
    assert {name: list(value.shape) for name, value in load_backbone(path).items()} == expected
    hub = saved(tmp_path / "hub.pth", {name: filled(shape) for name, shape in expected.items()})
    assert set(load_backbone(hub)) == set(expected)


# -- own files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "model.image.backbone.",
        "encoder.",
        "image_encoder._orig_mod.",
        "module._orig_mod.",
    ],
)
def test_own_checkpoints_however_they_were_wrapped(tmp_path: Path, prefix: str) -> None:
    state = state_of(network(), prefix)
    if "image" in prefix:
        state |= {"model.text.backbone.word.weight": torch.zeros(2), "loss.queues.ii.vectors": torch.zeros(3, 4)}
    path = saved(tmp_path / "last.ckpt", {"state_dict": state, "epoch": 1, "hyper_parameters": {"seed": 0}})
    require_equal(load_backbone(path), network().state_dict())


def test_the_query_encoder_is_taken_not_the_momentum_encoder(tmp_path: Path) -> None:
    tower = Tower(network(), intra_dim=4, inter_dim=4)
    average = {name: torch.zeros_like(value) for name, value in state_of(tower, "average.image.").items()}
    path = saved(tmp_path / "last.ckpt", {"state_dict": {**average, **state_of(tower, "model.image.")}})
    require_equal(load_backbone(path), tower.backbone.state_dict())


RECIPES = ["imagenet_linear", "in_sup", "voc07_svm", "coco_tagging", "cross_modal_search", "bridge", "voc_detection"]


def test_protocols_read_whatever_holds_the_encoder(tmp_path: Path, moco_file: Path) -> None:
    configured = [resolve("mct", recipe, scale="paper").config["model"]["init_args"] for recipe in RECIPES]
    prefixes = configured[0]["encoder_prefixes"]
    assert all(arguments["encoder_prefixes"] == prefixes for arguments in configured)
    tower = {"state_dict": state_of(Tower(network(), intra_dim=4, inter_dim=4), "model.image.")}
    own = [{"state_dict": state_of(network(), prefix)} for prefix in ("image_encoder.", "encoder.", "")]
    for number, content in enumerate((tower, *own, network().state_dict())):
        encoder = network(2)
        load_encoder(encoder, saved(tmp_path / f"{number}.ckpt", content), prefixes)
        require_equal(dict(encoder.state_dict()), network().state_dict())
    encoder = ImageResNet()
    for path in (moco_file, saved(tmp_path / "virtex.pth", virtex())):
        load_encoder(encoder, path, prefixes)
        require_equal(dict(encoder.state_dict()), load_backbone(path))


# -- export ------------------------------------------------------------------------------------------------------------


def test_detectron2_names_are_the_reference_ones() -> None:
    for rows in (MOCO["rows"], VIRTEX["visual"]):
        for _, ours, theirs, _ in rows:
            assert ours is None or detectron2_name(ours) == theirs


@pytest.fixture(scope="module")
def resnet50() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) if shape else torch.tensor(3) for name, _, shape in RESNET50}


@pytest.fixture(scope="module")
def resnet50_file(tmp_path_factory: pytest.TempPathFactory, resnet50: dict[str, Tensor]) -> Path:
    state = {f"model.image.backbone.{name}": value for name, value in resnet50.items()}
    return saved(tmp_path_factory.mktemp("own") / "last.ckpt", {"state_dict": state})


def test_torchvision_takes_the_export(resnet50_file: Path, resnet50: dict[str, Tensor], tmp_path: Path) -> None:
    path = export(resnet50_file, tmp_path / "new" / "resnet50.pth", "torchvision")
    model = torchvision.models.resnet50()
    result = model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    assert torch.equal(model.layer3[5].conv2.weight, resnet50["layer3.5.conv2.weight"])
    require_equal(load_backbone(path), resnet50)
    assert [file.name for file in path.parent.iterdir()] == ["resnet50.pth"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_takes_the_export(resnet50_file: Path, resnet50: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    path = export(resnet50_file, tmp_path / f"resnet50{suffix}", "timm")
    model = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(path))
    require_equal(dict(model.state_dict()), resnet50)
    require_equal(load_backbone(path), resnet50)


def test_detectron2_export(resnet50_file: Path, resnet50: dict[str, Tensor], tmp_path: Path) -> None:
    path = export(resnet50_file, tmp_path / "resnet50.pkl", "detectron2")
    raw = path.read_bytes()
    content = pickle.loads(raw)
    assert set(content) == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    assert {name: list(value.shape) for name, value in content["model"].items()} == {
        theirs: shape for _, theirs, shape in RESNET50
    }
    for ours, theirs, _ in RESNET50:
        assert torch.equal(torch.from_numpy(content["model"][theirs]), resnet50[ours])
    # An older numpy must be able to read the file.
    named = {text for _, text, _ in pickletools.genops(raw) if isinstance(text, str) and "numpy" in text}
    assert named == {"numpy"}
