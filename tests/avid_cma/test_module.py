"""AVID as a stage: what its configuration can say."""

from __future__ import annotations

from pathlib import Path

import torch

from common.training.runner import run_stage
from tests.stages import request


def test_each_bank_may_have_its_own_momentum(tmp_path: Path) -> None:
    stage = request("avid/avid", tmp_path, "--model.bank_momentum", "[1.0, 0.5]")
    run_stage(stage)
    state = torch.load(stage.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    torch.manual_seed(0)
    first = [torch.nn.functional.normalize(torch.randn(48, 8), dim=1) for _ in range(2)]
    torch.testing.assert_close(state["criterion.video_bank.vectors"], first[0])
    changed = (state["criterion.audio_bank.vectors"] - first[1]).abs().amax(dim=1) > 1e-3
    assert changed.sum() == 16  # two steps of eight
