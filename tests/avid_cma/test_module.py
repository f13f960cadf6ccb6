"""AVID as a stage: what its configuration can say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.stages.run import run_stage
from tests.stages import request


def test_the_ablation_setting_runs_on_the_miniature(tmp_path: Path) -> None:
    # At paper scale it reads a list of real clips, which the miniature has none of.
    cross = request("avid/ablation_cross", tmp_path)
    run_stage(cross)
    start = str(cross.directory / "checkpoints" / "last.ckpt")
    record = run_stage(request("avid/ablation_cma", tmp_path, "--model.warm_start", start))
    assert record.data["training (audioset)"]["samples"] == 60
    assert record.steps == 2


def test_each_bank_may_have_its_own_momentum(tmp_path: Path) -> None:
    stage = request("avid/avid", tmp_path, "--model.loss.bank_momentum", "[1.0, 0.5]")
    run_stage(stage)
    state = torch.load(stage.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    torch.manual_seed(0)
    first = [torch.nn.functional.normalize(torch.randn(60, 8), dim=1) for _ in range(2)]
    torch.testing.assert_close(state["loss.video_bank.vectors"], first[0])
    changed = (state["loss.audio_bank.vectors"] - first[1]).abs().amax(dim=1) > 1e-3
    assert changed.sum() == 16  # two steps of eight


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_banks_are_not_rounded(precision: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rounds the memory banks.*bf16-mixed"):
        run_stage(request("avid/avid", tmp_path, "--trainer.precision", precision))
