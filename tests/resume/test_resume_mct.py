"""MCT and its transfer protocols: killed and started again equals never stopped, queues and averages included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.protocols.bridge import BridgedRetrieval
from common.protocols.classification import LinearClassification
from common.protocols.search import CrossModalSearch
from common.stages.run import run_stage
from papers.mct.baselines.one_encoder import OneEncoder
from papers.mct.baselines.virtex import VirTex
from papers.mct.module import MCTModule
from tests.resume.killing import LAYER, compare, kill_at
from tests.stages import callbacks, request


# Four steps an epoch and a checkpoint every three: step 5 goes on from 3, in the middle of epoch 0; step 10 from 9, in
# the middle of epoch 2; the queue of 24 wraps in between, in the middle of a batch of 16.
@pytest.mark.parametrize(("killed_at", "workers"), [(5, 0), (10, 0), (10, 1)])
def test_mct_with_queues(tmp_path: Path, killed_at: int, workers: int) -> None:
    layer: dict[str, Any] = {
        "trainer": {**LAYER["trainer"], "callbacks": callbacks(3)},
        "model": {"init_args": {"loss": {"init_args": {"queue_size": 24}}, "batch_norm_group": 4}},
        "data": {"init_args": {"num_workers": workers, "word_dropout": 0.2}},
    }
    whole = request("mct/mct_tag", tmp_path / "whole", layer=layer)
    resumed = request("mct/mct_tag", tmp_path / "resumed", layer=layer)
    kill_at(resumed, MCTModule, killed_at)
    records = [run_stage(stage) for stage in (whole, resumed)]
    compare(whole, resumed)
    assert records[0].metrics == records[1].metrics
    assert records[0].steps == 12
    state = torch.load(whole.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert int(state["loss.queues.ii.pointer"]) == 12 * 16 % 24


def test_the_bridge_keeps_what_it_was_after_some_steps(tmp_path: Path) -> None:
    layer: dict[str, Any] = {
        "trainer": {**LAYER["trainer"], "max_epochs": -1, "max_steps": 9, "callbacks": callbacks(2)},
        "model": {"init_args": {"lengths": [2, 4, 9]}},
    }
    whole = request("mct/bridge", tmp_path / "whole", layer=layer)
    resumed = request("mct/bridge", tmp_path / "resumed", layer=layer)
    # The checkpoint of step 4 is written before the bridge of 4 steps is kept, and after that of 2 was.
    kill_at(resumed, BridgedRetrieval, 4)
    records = [run_stage(stage) for stage in (whole, resumed)]
    compare(whole, resumed)
    assert records[0].metrics == records[1].metrics
    state = torch.load(whole.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept = [state[f"kept.{length}.norms.image.num_batches_tracked"] for length in (2, 4, 9)]
    assert [int(steps) for steps in kept] == [2, 4, 9]


@pytest.mark.parametrize(
    ("stage", "module", "killed_at"),
    [
        ("virtex", VirTex, 7),
        ("one_encoder", OneEncoder, 7),
        ("imagenet_linear", LinearClassification, 7),
        ("cross_modal_search", CrossModalSearch, 9),
    ],
)
def test_the_other_modules(tmp_path: Path, stage: str, module: type, killed_at: int) -> None:
    layer = {"trainer": {**LAYER["trainer"], "callbacks": callbacks(2)}}
    whole = request(f"mct/{stage}", tmp_path / "whole", layer=layer)
    resumed = request(f"mct/{stage}", tmp_path / "resumed", layer=layer)
    kill_at(resumed, module, killed_at)
    for run in (whole, resumed):
        run_stage(run)
    compare(whole, resumed)
