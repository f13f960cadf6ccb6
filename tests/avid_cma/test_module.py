"""Test AVID as a stage: which configurations are valid, and that the model learns (`make test-slow`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from assemble.stages.run import run_stage
from tests.stages import request

#: Half of the miniature's epochs, which is enough for the loss to fall.
LAYER = {"trainer": {"max_epochs": 12}}


def test_banks_are_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision"):
        run_stage(request("avid/avid", tmp_path, "--trainer.precision", "bf16-true"))


def sound_accuracy(runs: Path, recipe: str) -> float:
    """Pre-train briefly at the mini scale, and return the SVM's accuracy (percent) on the last audio features."""
    stage = request(f"avid/{recipe}", runs / recipe, layer=LAYER, scale="mini")
    run_stage(stage)
    checkpoint = str(stage.directory / "checkpoints" / "last.ckpt")
    loaded = ("--model.pretrained", checkpoint, "--data.audio.statistics", checkpoint)
    probe = request("avid/esc50_svm", runs / recipe, *loaded, scale="mini")
    value = run_stage(probe).metrics["test/conv5x_top1"]
    assert value is not None
    return value


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_other_modality_teaches_more_than_ones_own(tmp_path: Path) -> None:
    assert sound_accuracy(tmp_path, "avid") >= sound_accuracy(tmp_path, "avid_self") + 15
