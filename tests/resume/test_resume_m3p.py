"""A killed run of M3P goes on in the middle of a cycle of tasks, with the languages, masks and words as without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.stages.run import run_stage
from papers.m3p.module import M3PModule
from tests.m3p.stages import stage
from tests.resume.killing import compare, kill_at
from tests.stages import callbacks

# Two iterations make an update and eight an epoch; a checkpoint every three updates: the kill at update 5 goes back to
# 3, which is in the middle of the first epoch.
TRAINER = {"max_epochs": 2, "limit_train_batches": 8, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
LAYER = {
    "trainer": {**TRAINER, "callbacks": callbacks(3)},
    # A weight that moves must go on from where it was.
    "model": {"init_args": {"weight_xmlm": "0:1,16:0"}},
    "data": {"init_args": {"steps_per_epoch": 8, "test_sets": ["multi30k_en", "stair_ja"]}},
}
FINE_TUNE = {
    "trainer": {**TRAINER, "limit_train_batches": 4, "callbacks": callbacks(3)},
    "data": {"init_args": {"train_sets": ["multi30k_en", "multi30k_fr"], "test_sets": ["multi30k_fr"]}},
}


@pytest.mark.parametrize(("recipe", "layer", "steps"), [("m3p", LAYER, 8), ("fine_tune", FINE_TUNE, 4)])
def test_killed_and_resumed_equals_uninterrupted(
    recipe: str, layer: dict[str, object], steps: int, tmp_path: Path
) -> None:
    stages = [stage(recipe, tmp_path / name, layer=layer) for name in ("whole", "resumed")]
    kill_at(stages[1], M3PModule, 5 if recipe == "m3p" else 3)
    records = [run_stage(one) for one in stages]
    compare(*stages)
    assert records[0].metrics == records[1].metrics
    assert records[0].steps == records[1].steps == steps
