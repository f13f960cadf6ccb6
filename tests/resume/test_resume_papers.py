"""Check that resumed runs equal uninterrupted ones: MCT's queues, M3P's tasks, XMC-GAN's optimizers, and noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.protocols.bridge import BridgedRetrieval
from common.protocols.classification import ActionRecognition, LinearClassification, LinearProbes
from common.protocols.search import CrossModalSearch
from common.training.selection import BestWeights
from papers.m3p.module import M3PModule
from papers.mct.baselines.one_encoder import OneEncoder
from papers.mct.baselines.virtex import VirTex
from papers.mct.module import MCTModule
from papers.vx2text.miniature import TextPretraining
from papers.vx2text.module import VX2TextModule
from papers.xmc_gan.module import XMCGANModule
from tests.m3p.stages import stage as m3p_stage
from tests.resume.killing import LAYER, assert_resumes, run_and_resume
from tests.stages import callbacks, request
from tests.vx2text import stages as vx2text
from tests.xmc_gan import stages as xmc_gan

# With four steps per epoch and a checkpoint every three, a kill at step 8 resumes from 6, within epoch 1.
EVERY_THREE = {"trainer": {**LAYER["trainer"], "callbacks": callbacks(3)}}
WITHOUT_PARENTS = {"vx2text/avsd": vx2text.WITHOUT_PARENTS, "xmc_gan/xmc_gan": xmc_gan.WITHOUT_PARENTS}


@pytest.mark.parametrize(
    ("recipe", "module"),
    [("vx2text/avsd", VX2TextModule), ("vx2text/text_words", TextPretraining), ("xmc_gan/xmc_gan", XMCGANModule)],
)
def test_noise_dropout_averages_and_spectral_vectors(recipe: str, module: type, tmp_path: Path) -> None:
    stage = request(recipe, tmp_path, *WITHOUT_PARENTS.get(recipe, []), layer=EVERY_THREE)
    assert assert_resumes(stage, module, 8).steps == 12
    if module is XMCGANModule:
        state = torch.load(stage.directory / "checkpoints" / "last.ckpt", weights_only=True)
        steps = [{int(entry["step"]) for entry in own["state"].values()} for own in state["optimizer_states"]]
        assert steps == [{12}, {24}]  # the generator's steps, and the discriminator's, two per iteration
        assert any(name.endswith(".u") for name in state["state_dict"])


# With four steps per epoch and a checkpoint every three, a kill at step 5 resumes from 3, within epoch 0, and a kill at
# step 10 resumes from 9, within epoch 2. In between, the queue of 24 wraps within a batch of 16.
@pytest.mark.parametrize(("killed_at", "workers"), [(5, 0), (10, 1)])
def test_mct_with_queues(tmp_path: Path, killed_at: int, workers: int) -> None:
    layer: dict[str, Any] = {
        "trainer": {**LAYER["trainer"], "callbacks": callbacks(3)},
        "model": {"init_args": {"loss": {"init_args": {"queue_size": 24}}, "batch_norm_group": 4}},
        "data": {"init_args": {"num_workers": workers, "word_dropout": 0.2}},
    }
    stage = request("mct/mct_tag", tmp_path, layer=layer)
    assert assert_resumes(stage, MCTModule, killed_at).steps == 12
    state = torch.load(stage.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert int(state["loss.queues.ii.pointer"]) == 12 * 16 % 24


def test_the_bridge_keeps_what_it_was_after_some_steps(tmp_path: Path) -> None:
    layer: dict[str, Any] = {
        "trainer": {**LAYER["trainer"], "max_epochs": -1, "max_steps": 9, "callbacks": callbacks(2)},
        "model": {"init_args": {"lengths": [2, 4, 9]}},
    }
    stage = request("mct/bridge", tmp_path, layer=layer)
    # The checkpoint of step 4 is written after the bridge of 2 steps is kept, but before the bridge of 4 steps is kept.
    assert_resumes(stage, BridgedRetrieval, 4)
    state = torch.load(stage.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept = [state[f"kept.{length}.norms.image.num_batches_tracked"] for length in (2, 4, 9)]
    assert [int(steps) for steps in kept] == [2, 4, 9]


@pytest.mark.parametrize(
    ("recipe", "module", "arguments", "killed_at"),
    [
        ("avid/kinetics_linear", LinearProbes, {}, 7),  # with a frozen encoder
        ("avid/ucf101_fine_tune", ActionRecognition, {"warmup_epochs": 1, "milestones": [1]}, 7),  # with dropout
        ("mct/virtex", VirTex, {}, 7),
        ("mct/one_encoder", OneEncoder, {}, 7),
        ("mct/imagenet_linear", LinearClassification, {}, 7),
        ("mct/cross_modal_search", CrossModalSearch, {}, 9),
    ],
)
def test_protocols_and_baselines(
    recipe: str, module: type, arguments: dict[str, Any], killed_at: int, tmp_path: Path
) -> None:
    layer = {"trainer": {**LAYER["trainer"], "callbacks": callbacks(2)}, "model": {"init_args": arguments}}
    assert_resumes(request(recipe, tmp_path, layer=layer), module, killed_at)


# A cycle has two iterations, and an epoch has eight. With one update per cycle and a checkpoint every three updates, a
# kill at update 5 resumes from 3, within the first epoch.
TRAINER = {"max_epochs": 2, "limit_train_batches": 8, "log_every_n_steps": 1}
M3P = {
    "trainer": {**TRAINER, "callbacks": callbacks(3)},
    "model": {"init_args": {"updates": "per_cycle"}},
    "data": {"init_args": {"steps_per_epoch": 8, "test_sets": ["multi30k_en", "stair_ja"]}},
}
# Five groups of losses make five updates in the first iteration of each cycle, so a kill at 15 resumes from 10.
BY_GROUP = {
    **M3P,
    "trainer": {**TRAINER, "callbacks": callbacks(10)},
    "model": {"init_args": {"updates": "per_group"}},
}
# Two groups of losses make two updates per cycle, so a kill at 6 resumes from 4.
FINE_TUNE = {
    "trainer": {**TRAINER, "limit_train_batches": 4, "callbacks": callbacks(4)},
    "data": {"init_args": {"train_sets": ["multi30k_en", "multi30k_fr"], "test_sets": ["multi30k_fr"]}},
}


@pytest.mark.parametrize(
    ("recipe", "layer", "kill", "steps"),
    [("m3p", M3P, 5, 8), ("m3p", BY_GROUP, 15, 40), ("fine_tune", FINE_TUNE, 6, 8)],
    ids=["per_cycle", "per_group", "fine_tune"],
)
def test_m3p_in_the_middle_of_a_cycle_of_tasks(
    recipe: str, layer: dict[str, object], kill: int, steps: int, tmp_path: Path
) -> None:
    assert assert_resumes(m3p_stage(recipe, tmp_path / "runs", layer=layer), M3PModule, kill).steps == steps


@pytest.mark.parametrize(
    ("owner", "method", "when", "length"),
    [
        (BestWeights, "compare", lambda *_, at_end=False: at_end, {"max_epochs": -1, "max_steps": 8}),
        (M3PModule, "test_step", lambda *_: True, {"max_epochs": 1}),
    ],
    ids=["ending", "testing"],
)
def test_a_run_killed_after_its_last_step_tests_the_best_weights(
    length: dict[str, int], owner: type, method: str, when: Callable[..., bool], tmp_path: Path
) -> None:
    """The last step's checkpoint is written twice: before the last weights are compared with the best, and after."""
    layer = {
        **FINE_TUNE,
        "trainer": {**FINE_TUNE["trainer"], **length},
        "model": {"init_args": {"selection": "best", "select_every": 3}},
    }
    made, _ = run_and_resume(m3p_stage("fine_tune", tmp_path / "runs", layer=layer), owner, method, when)
    assert made[1].metrics["test/selected_iteration"] > 0
