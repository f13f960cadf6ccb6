"""The commands of M3P as a user calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.commands.main import main
from common.reporting import records
from papers.m3p.encoder import M3P, M3PEncoder
from papers.m3p.weights import load_into_model
from tests.m3p.stages import region_network

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
