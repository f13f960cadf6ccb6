"""Test released checkpoints, our checkpoints, and exported backbones. The tests write files in the released layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assemble.stages.configuration import resolve
from common.encoders.audio import AudioConvNet
from common.encoders.checkpoint_files import load_encoder
from common.encoders.heads import ProjectionHead
from common.encoders.video import R2Plus1D
from papers.avid_cma.networks import AVID
from papers.avid_cma.weights import CheckpointError, export, load_backbone, load_pretraining
from tests.encoders.test_checkpoint_files import require_equal

LAYOUT = json.loads(
    (Path(__file__).parents[1] / "golden" / "avid_cma" / "official_state_dict.json").read_text(encoding="utf-8")
)


def prefixes_of(recipe: str) -> list[str]:
    """Return the prefixes under which a recipe looks for its encoder."""
    return list(resolve("avid_cma", recipe, scale="paper").config["model"]["init_args"]["encoder_prefixes"])


def official(score: Tensor, positives: Tensor | None = None) -> dict[str, Any]:
    """Make a checkpoint in the released layout with few rows in its banks."""
    generator = torch.Generator().manual_seed(0)
    model = {
        LAYOUT["model_prefix"] + key: torch.tensor(7) if not shape else torch.randn(shape, generator=generator)
        for key, shape in LAYOUT["model"].items()
    }
    criterion = {
        "nce_average.view1_mem": torch.randn(20, 128, generator=generator),
        "nce_average.view2_mem": torch.randn(20, 128, generator=generator),
        "criterion.avg_exp_score": score,
    }
    if positives is not None:
        criterion["nce_average.positive_set"] = positives
    optimizer = {"state": {}, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999)}]}
    return {"epoch": 30, "model": model, "optimizer": optimizer, "train_criterion": criterion}


@pytest.fixture(scope="module")
def official_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "AVID_CMA_Kinetics.pth.tar"
    positives = torch.arange(20 * 3, dtype=torch.int32).view(20, 3)
    torch.save(official(torch.tensor([2.25]), positives), path)
    return path


def small_model() -> AVID:
    torch.manual_seed(1)
    return AVID(
        R2Plus1D(depth=10, width=2, stem_pool=False),
        AudioConvNet(width=2),
        ProjectionHead(16, 8, 4),
        ProjectionHead(16, 8, 4),
    )


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    state = {f"model.{key}": value for key, value in small_model().state_dict().items()}
    state["loss.video_bank.vectors"] = torch.ones(5, 4)
    state["loss.audio_bank.vectors"] = torch.zeros(5, 4)
    state["loss.normalizer"] = torch.tensor(2.5)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "epoch": 3, "global_step": 9, "listing_fingerprint": "abc"}, path)
    return path


def test_official_checkpoint(official_file: Path) -> None:
    model = AVID(R2Plus1D(), AudioConvNet(), ProjectionHead(), ProjectionHead())
    found = load_pretraining(official_file, model)
    assert set(found.model) == set(LAYOUT["model"])
    model.load_state_dict(found.model, strict=True)
    video, audio = found.memory["video_bank.vectors"], found.memory["audio_bank.vectors"]
    assert video.shape == audio.shape == (20, 128)
    assert not torch.equal(video, audio)
    assert found.memory["normalizer"].item() == 2.25
    assert found.memory["normalizer"].shape == ()
    assert found.listing_fingerprint is None


@pytest.mark.parametrize(("wrapping", "prefix"), [("model", "module."), ("state_dict", ""), (None, "module.")])
def test_a_released_network_of_depth_10_loads_everywhere(tmp_path: Path, wrapping: str | None, prefix: str) -> None:
    # At depth 10 each stage has a single block, and the released names don't number the block.
    expected = small_model().state_dict()
    released = {prefix + key.replace("x.0.", "x."): value for key, value in expected.items()}
    assert f"{prefix}video_model.conv2x.spt_conv1.weight" in released
    path = tmp_path / "Cross-N1024.pth.tar"
    torch.save({wrapping: released, "train_criterion": {}, "epoch": 100} if wrapping else released, path)
    found = load_pretraining(path, small_model()).model
    small_model().load_state_dict(found, strict=True)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    video = R2Plus1D(depth=10, width=2, stem_pool=False)
    load_encoder(video, path, prefixes_of("kinetics_linear_small"))
    assert torch.equal(video.conv5x[0].out_bn.weight, expected["video_model.conv5x.0.out_bn.weight"])
    assert torch.equal(video.conv5x[0].tmp_conv2.weight, expected["video_model.conv5x.0.tmp_conv2.weight"])
    assert load_backbone(path, "video").keys() == video.state_dict().keys()
    assert load_backbone(path, "audio").keys() == AudioConvNet(width=2).state_dict().keys()


def test_official_weights_end_in_the_right_tower(official_file: Path) -> None:
    content = torch.load(official_file, weights_only=True)["model"]
    video, audio = R2Plus1D(), AudioConvNet()
    for encoder, recipe in ((video, "ucf101_fine_tune"), (audio, "esc50_svm")):
        load_encoder(encoder, official_file, prefixes_of(recipe))
    assert torch.equal(video.conv5x[1].tmp_conv2.weight, content["module.video_model.conv5x.1.tmp_conv2.weight"])
    assert torch.equal(audio.block4.bn2.running_var, content["module.audio_model.block4.bn2.running_var"])


def test_own_checkpoint_as_a_start(own_file: Path) -> None:
    model = small_model()
    start = load_pretraining(own_file, model)
    model.load_state_dict(start.model, strict=True)
    assert start.memory["video_bank.vectors"].shape == (5, 4)
    assert start.memory["normalizer"].item() == 2.5
    assert start.listing_fingerprint == "abc"
    with pytest.raises(CheckpointError, match=r"model\.warm_start"):
        load_pretraining(own_file, AVID(R2Plus1D(10, 4), AudioConvNet(2), nn.Identity(), nn.Identity()))


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_exported_backbone_is_the_same_and_small(own_file: Path, tmp_path: Path, modality: Any) -> None:
    output = export(own_file, tmp_path / "exported" / "backbone.pt", modality)
    expected = getattr(small_model(), f"{modality}_model").state_dict()
    for state in (load_backbone(own_file, modality), torch.load(output, weights_only=True)["state_dict"]):
        assert set(state) == set(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert [file.name for file in output.parent.iterdir()] == ["backbone.pt"]


@pytest.mark.parametrize(("modality", "recipe"), [("video", "kinetics_linear"), ("audio", "dcase_svm")])
def test_protocols_read_whatever_holds_the_encoder(own_file: Path, tmp_path: Path, modality: Any, recipe: str) -> None:
    expected = getattr(small_model(), f"{modality}_model")
    protocol = tmp_path / "protocol.ckpt"
    torch.save({"state_dict": {f"encoder.{name}": value for name, value in expected.state_dict().items()}}, protocol)
    for path in (own_file, export(own_file, tmp_path / "exported.pt", modality), protocol):
        torch.manual_seed(2)
        encoder = R2Plus1D(depth=10, width=2, stem_pool=False) if modality == "video" else AudioConvNet(width=2)
        load_encoder(encoder, path, prefixes_of(recipe))
        require_equal(encoder, expected)
