"""A killed run of XMC-GAN goes on: both optimizers, the average, spectral vectors, statistics, noise and captions."""

from __future__ import annotations

from pathlib import Path

import torch

from common.stages.run import run_stage
from papers.xmc_gan.module import XMCGANModule
from tests.resume.killing import compare, kill_at
from tests.stages import callbacks, request

# Four iterations an epoch of two minibatches, a checkpoint every three: 8 goes on from 6, in the middle of epoch 1.
LAYER = {"trainer": {"max_epochs": 3, "limit_train_batches": 1.0, "log_every_n_steps": 1, "callbacks": callbacks(3)}}
WITHOUT_PARENTS = ["--model.image_network.pretrained", "null", "--model.evaluation.evaluator.pretrained", "null"]


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    stages = [
        request("xmc_gan/xmc_gan", tmp_path / name, *WITHOUT_PARENTS, layer=LAYER) for name in ("whole", "resumed")
    ]
    kill_at(stages[1], XMCGANModule, 8)
    records = [run_stage(stage) for stage in stages]
    compare(*stages)
    assert records[0].metrics == records[1].metrics
    assert records[0].steps == records[1].steps == 12
    state = torch.load(stages[1].directory / "checkpoints" / "last.ckpt", weights_only=True)
    steps = [{int(entry["step"]) for entry in own["state"].values()} for own in state["optimizer_states"]]
    assert steps == [{12}, {24}]  # the generator's, and the discriminator's two for each iteration
    assert any(name.endswith(".u") for name in state["state_dict"])
