"""AVID as a stage: what its configuration can say, and that it learns (`make test-slow`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from assemble.stages.run import run_stage
from common.encoders.audio import AudioConvNet
from common.encoders.video import R2Plus1D
from papers.avid_cma.loss import BankLoss
from papers.avid_cma.module import AVIDModule
from tests.stages import request

#: Half of the miniature's steps: enough to leave the plateau.
LAYER = {"trainer": {"max_epochs": 12}}


def test_the_ablation_setting_runs_on_the_miniature(tmp_path: Path) -> None:
    # At paper scale it reads a list of real clips, which the miniature has none of.
    cross = request("avid/ablation_cross", tmp_path)
    run_stage(cross)
    start = str(cross.directory / "checkpoints" / "last.ckpt")
    record = run_stage(request("avid/ablation_cma", tmp_path, "--model.warm_start", start))
    assert record.data["training (audioset)"]["samples"] == 60
    assert record.steps == 4


def test_the_optimizer_takes_its_values_from_the_recipe() -> None:
    options: dict[str, Any] = {"learning_rate": 0.25, "betas": (0.5, 0.75), "weight_decay": 0.125, "lr_milestones": [2]}
    made = AVIDModule(R2Plus1D(10, 4), AudioConvNet(4), BankLoss(), **options).configure_optimizers()
    (group,) = made["optimizer"].param_groups
    rates = []
    for _ in range(3):
        rates.append(group["lr"])
        made["optimizer"].step()
        made["lr_scheduler"].step()
    assert rates == pytest.approx([0.25, 0.25, 0.025])
    assert (type(made["optimizer"]), group["betas"], group["weight_decay"]) == (torch.optim.Adam, (0.5, 0.75), 0.125)


def test_banks_are_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision"):
        run_stage(request("avid/avid", tmp_path, "--trainer.precision", "bf16-true"))


def sound_accuracy(runs: Path, recipe: str) -> float:
    """Accuracy in percent of the SVM on the last audio stage, after a short pre-training at the mini scale."""
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
