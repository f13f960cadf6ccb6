"""A killed run of M3P goes on in the middle of a cycle of tasks, with the languages, masks and words as without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.stages.run import run_stage
from common.training.selection import BestWeights
from papers.m3p.module import M3PModule
from tests.m3p.stages import stage
from tests.resume.killing import compare, kill_at, kill_when
from tests.stages import callbacks

# Two iterations are a cycle and eight an epoch. With an update for each and a checkpoint every three, the kill at
# update 5 goes back to 3, which is in the middle of the first epoch.
TRAINER = {"max_epochs": 2, "limit_train_batches": 8, "log_every_n_steps": 1}
LAYER = {
    "trainer": {**TRAINER, "callbacks": callbacks(3)},
    "model": {"init_args": {"updates": "per_cycle"}},
    "data": {"init_args": {"steps_per_epoch": 8, "test_sets": ["multi30k_en", "stair_ja"]}},
}
# Five groups of losses make five updates in the first iteration of every cycle: the kill at 15 goes back to 10.
BY_GROUP = {
    **LAYER,
    "trainer": {**TRAINER, "callbacks": callbacks(10)},
    "model": {"init_args": {"updates": "per_group"}},
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


@pytest.mark.parametrize(
    ("owner", "method", "when"),
    [(BestWeights, "compare", lambda *_, at_end=False: at_end), (M3PModule, "test_step", lambda *_: True)],
    ids=["ending", "testing"],
)
@pytest.mark.parametrize("length", [{"max_epochs": -1, "max_steps": 8}, {"max_epochs": 1}], ids=["steps", "epochs"])
def test_a_run_killed_after_its_last_step_tests_the_best_weights(
    length: dict[str, int], owner: type, method: str, when: Callable[..., bool], tmp_path: Path
) -> None:
    """The checkpoint of the last step is written before the last weights are compared, and again after."""
    layer = {
        **FINE_TUNE,
        "trainer": {**FINE_TUNE["trainer"], **length},
        "model": {"init_args": {"selection": "best", "select_every": 3}},
    }
    stages = [stage("fine_tune", tmp_path / name, layer=layer) for name in ("whole", "resumed")]
    kill_when(stages[1], owner, method, when)
    assert (stages[1].directory / "checkpoints" / "last.ckpt").is_file()
    records = [run_stage(one) for one in stages]
    compare(*stages)
    assert records[0].metrics == records[1].metrics
    assert records[1].metrics["test/selected_iteration"] > 0
