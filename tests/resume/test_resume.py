"""Check that a run killed within an epoch and resumed equals an uninterrupted run bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from assemble.reporting import records
from assemble.stages import folder as folders
from assemble.stages.folder import claimed, prepare_folder
from assemble.stages.plan import state_of
from assemble.stages.request import identity_of
from assemble.stages.run import run_stage
from common.errors import StageError
from common.training.switches import ApplySwitches
from papers.avid_cma.loss import BankLoss
from papers.avid_cma.module import AVIDModule
from tests.machine import LONG
from tests.resume.killing import LAYER, assert_equal, assert_resumes, compare, kill_at, run_and_resume
from tests.stages import callbacks, request
from tests.trained import copied_avid


# With seven steps per epoch and a checkpoint every four steps, a kill at step 5 resumes from 4, and one at 14 from 12.
# tests/running/test_preemption.py resumes from every step, including the last of an epoch. Loader processes are also
# tested, because they start before Lightning tells the sampler the epoch.
@pytest.mark.parametrize(("killed_at", "workers"), [(5, 0), (14, 1)])
def test_avid(tmp_path: Path, killed_at: int, workers: int) -> None:
    layer = {**LAYER, "data": {"init_args": {"num_workers": workers}}}
    assert assert_resumes(request("avid/avid_joint", tmp_path, layer=layer), AVIDModule, killed_at).steps == 21


@pytest.mark.parametrize(
    ("owner", "method", "length"),
    [
        (ApplySwitches, "on_train_end", {"max_epochs": 2}),
        (AVIDModule, "test_step", {"max_epochs": -1, "max_steps": 14}),
    ],
    ids=["ending", "testing"],
)
def test_a_run_killed_after_its_last_step_logs_and_saves_what_an_uninterrupted_one_does(
    owner: type, method: str, length: dict[str, int], tmp_path: Path
) -> None:
    layer = {"trainer": {**LAYER["trainer"], **length, "callbacks": callbacks(7)}}
    made, _ = run_and_resume(request("avid/avid_joint", tmp_path, layer=layer), owner, method, lambda *_: True)
    assert made[1].steps == 14


STEPS = {"filename": "step{step:02d}", "every_n_train_steps": 8}
EPOCHS = {"filename": "epoch{epoch:02d}", "every_n_epochs": 1, "save_on_train_epoch_end": True}


@pytest.mark.parametrize(
    ("last", "kept", "count", "method", "when"),
    [
        (4, STEPS, 2, "_save_checkpoint", lambda self, trainer, path: path.endswith("step08.ckpt")),
        (
            7,
            EPOCHS,
            3,
            "on_train_epoch_end",
            lambda self, trainer, *_: "{epoch" in self.filename and trainer.current_epoch,
        ),
    ],
    ids=["steps", "epochs"],
)
def test_a_checkpoint_that_is_kept_is_written_after_a_resume_from_its_own_step(
    last: int, kept: dict[str, Any], count: int, method: str, when: Callable[..., bool], tmp_path: Path
) -> None:
    """Resume after a kill between writing the last checkpoint and writing the permanent checkpoint."""
    one = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    one["init_args"] = {  # type: ignore[assignment]
        "dirpath": "$RUN/checkpoints", "auto_insert_metric_name": False, "save_top_k": -1, "save_weights_only": True,
        "enable_version_counter": False, **kept,
    }  # fmt: skip
    layer = {"trainer": {**LAYER["trainer"], "callbacks": [*callbacks(last), one]}}
    stage = request("avid/avid_joint", tmp_path, layer=layer)
    _, whole = run_and_resume(stage, ModelCheckpoint, method, when)
    files = [sorted((folder / "checkpoints").glob("*.ckpt")) for folder in (whole, stage.directory)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert len(files[0]) == count + 1
    for pair in zip(*files):
        states = [torch.load(path, weights_only=True)["state_dict"] for path in pair]
        assert_equal(*states, pair[0].name)


def test_a_session_with_changes_that_were_not_committed_makes_no_clean_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = request("avid/avid_joint", tmp_path, layer=LAYER)
    states = [{"revision": "aaa", "dirty": True}, {"revision": "bbb", "dirty": False}]
    monkeypatch.setattr(records, "git_state", lambda root: dict(states[0]))
    kill_at(stage, AVIDModule, 10)
    assert state_of(stage) == (False, "was stopped, resumes from its last checkpoint")
    changed = replace(stage, overrides={"model.init_args.learning_rate": 0.5})
    assert state_of(changed)[1].endswith("changed: starts again")
    monkeypatch.setattr(records, "git_state", lambda root: dict(states[1]))
    record = run_stage(stage)
    assert record.git == {"revision": "bbb", "dirty": True, "earlier": ["aaa"]}
    assert not record.clean
    (stage.directory / "record.json").unlink()
    assert run_stage(stage).git == record.git  # this session only tests


def test_cma_with_a_set_mined_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {**LAYER, "model": {"init_args": {"refresh_every": 1}}}
    stages = []
    for name in ("whole", "resumed"):
        copied_avid(tmp_path / name)
        stages.append(request("avid/avid_cma", tmp_path / name, layer=layer))
    kill_at(stages[1], AVIDModule, 10)
    mined: list[int] = []
    original = BankLoss.mine

    def mine(self: BankLoss) -> Tensor:
        mined.append(self.step)
        return original(self)

    monkeypatch.setattr(BankLoss, "mine", mine)
    run_stage(stages[0])
    assert mined == [0, 7, 14]
    run_stage(stages[1])
    assert mined[3:] == [14]  # the checkpoint has the set of epoch 2
    compare(*(stage.directory for stage in stages))


def test_a_change_that_is_taken_back_finds_its_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = request("avid/avid", tmp_path, layer=LAYER)
    record = run_stage(stage)
    changed = replace(stage, overrides={"model.init_args.learning_rate": 0.5})
    another = replace(stage, overrides={"model.init_args.learning_rate": 0.4})
    prepare_folder(changed)
    prepare_folder(another)
    kill_at(changed, AVIDModule, 10)
    assert state_of(stage)[1].endswith("changed: starts again")

    def other_rank() -> None:
        os.environ["RANK"] = "1"
        os._exit(0 if run_stage(stage, unless_done=True).to_json() == record.to_json() else 1)

    other = multiprocessing.get_context("fork").Process(target=other_rank)
    other.start()
    time.sleep(1)  # rank 1 looks before rank 0 restores the run
    assert run_stage(stage, unless_done=True).to_json() == record.to_json()
    other.join(LONG)
    assert other.exitcode == 0
    assert "the configuration was reverted" in capsys.readouterr().out
    assert state_of(stage)[0]

    def set_aside() -> set[str]:
        return {identity_of(path)["lineage_hash"] for path in stage.directory.parent.glob("*.previous-*")}

    assert set_aside() == {changed.lineage}  # not `another`, which has no checkpoint
    prepare_folder(another)
    assert set_aside() == {changed.lineage, stage.lineage}
    prepare_folder(changed)
    assert state_of(changed)[1] == "was stopped, resumes from its last checkpoint"
    assert set_aside() == {stage.lineage}
    shutil.rmtree(stage.directory)
    stage.directory.mkdir()  # as if a command was killed before writing anything
    prepare_folder(another)
    assert len([*stage.directory.parent.glob("*.previous-*")]) == 1
    (stage.directory / "identity.json").write_text("[]")
    with pytest.raises(StageError, match=r"identity\.json cannot be read"):
        prepare_folder(stage)


def test_a_second_command_waits_for_the_stage_says_so_and_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folders, "LOCK_PATIENCE", 2.0)
    stage = request("avid/avid_joint", tmp_path)
    with claimed(stage), pytest.raises(StageError, match="already running in another process"), claimed(stage):
        pass
    assert "avid_joint: waits for another process, which locks " in capsys.readouterr().out
    with claimed(stage):
        pass
