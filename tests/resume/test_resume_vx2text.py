"""A killed run of VX2TEXT goes on with the very Gumbel noise and dropout that it would have had."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.stages.run import run_stage
from papers.vx2text.miniature import TextPretraining
from papers.vx2text.module import VX2TextModule
from tests.resume.killing import compare, kill_at
from tests.stages import callbacks, request

# Four steps an epoch, a checkpoint every three: step 8 goes on from 6, in the middle of epoch 1.
LAYER = {"trainer": {"max_epochs": 3, "limit_train_batches": 1.0, "log_every_n_steps": 1, "callbacks": callbacks(3)}}
WITHOUT_PARENTS = [
    argument for name in ("text", "video", "audio") for argument in (f"--model.{name}_pretrained", "null")
]


@pytest.mark.parametrize(("recipe", "module"), [("avsd", VX2TextModule), ("text_words", TextPretraining)])
def test_killed_and_resumed_equals_uninterrupted(recipe: str, module: type, tmp_path: Path) -> None:
    parents = WITHOUT_PARENTS if recipe == "avsd" else []
    stages = [request(f"vx2text/{recipe}", tmp_path / name, *parents, layer=LAYER) for name in ("whole", "resumed")]
    kill_at(stages[1], module, 8)
    records = [run_stage(stage) for stage in stages]
    compare(*stages)
    assert records[0].metrics == records[1].metrics
    assert records[0].steps == records[1].steps == 12
