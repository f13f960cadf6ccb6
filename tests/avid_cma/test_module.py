"""AVID as a stage: what its configuration can say."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_banks_are_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision"):
        run_stage(request("avid/avid", tmp_path, "--trainer.precision", "bf16-true"))
