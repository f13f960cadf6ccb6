"""A killed run of M3P goes on in the middle of a cycle of tasks, with the languages, masks and words as without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.stages.run import run_stage
from papers.m3p.module import M3PModule
from tests.m3p.stages import stage
from tests.resume.killing import compare, kill_at
from tests.stages import callbacks

# Two iterations are a cycle and eight an epoch. With an update for each and a checkpoint every three, the kill at
# update 5 goes back to 3, which is in the middle of the first epoch.
TRAINER = {"max_epochs": 2, "limit_train_batches": 8, "log_every_n_steps": 1}
LAYER = {
    "trainer": {**TRAINER, "callbacks": callbacks(3)},
    # A weight that moves must go on from where it was.
    "model": {"init_args": {"weight_xmlm": "0:1,20:0.2", "updates": "per_cycle"}},
    "data": {"init_args": {"steps_per_epoch": 8, "test_sets": ["multi30k_en", "stair_ja"]}},
}
# Five groups of losses make five updates in the first iteration of every cycle: the kill at 15 goes back to 10.
BY_GROUP = {
    **LAYER,
    "trainer": {**TRAINER, "callbacks": callbacks(10)},
    "model": {"init_args": {"weight_xmlm": "0:1,20:0.2", "updates": "per_group"}},
}
# Two groups: the kill at 6 goes back to 4.
FINE_TUNE = {
    "trainer": {**TRAINER, "limit_train_batches": 4, "callbacks": callbacks(4)},
    "data": {"init_args": {"train_sets": ["multi30k_en", "multi30k_fr"], "test_sets": ["multi30k_fr"]}},
}


@pytest.mark.parametrize(
    ("recipe", "layer", "kill", "steps"),
    [("m3p", LAYER, 5, 8), ("m3p", BY_GROUP, 15, 40), ("fine_tune", FINE_TUNE, 6, 8)],
    ids=["per_cycle", "per_group", "fine_tune"],
)
def test_killed_and_resumed_equals_uninterrupted(
    recipe: str, layer: dict[str, object], kill: int, steps: int, tmp_path: Path
) -> None:
    stages = [stage(recipe, tmp_path / name, layer=layer) for name in ("whole", "resumed")]
    kill_at(stages[1], M3PModule, kill)
    records = [run_stage(one) for one in stages]
    compare(*stages)
    assert records[0].metrics == records[1].metrics
    assert records[0].steps == records[1].steps == steps
