"""Test how a stage starts: its processes, its imports, and what stays in memory."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.trainer import call

from assemble.reporting.papers import project_root
from assemble.stages.cli import StageCLI
from assemble.stages.folder import _wait_for_main_process
from assemble.stages.launch import is_main_process, require_processes
from assemble.stages.lightning_workarounds import quiet_lightning
from assemble.stages.run import run_stage
from common.errors import StageError
from tests.machine import LONG
from tests.stages import request

NAMES = (
    *("LOCAL_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    *("SLURM_JOB_NAME", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}
BATCH = {"SLURM_JOB_NAME": "wrap", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
STEP = {**BATCH, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}
#: The job has the nodes gpu9 and gpu10. torchrun counts gpu10 as the first node, and SLURM counts gpu9.
IN_A_JOB = {**TORCHRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
OTHER_NODE = {**IN_A_JOB, "RANK": "8", "SLURM_PROCID": "0"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def under(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_other_ranks_wait_for_the_first_ones_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity, waited = tmp_path / "identity.json", []

    def prepared(seconds: float) -> None:
        waited.append(seconds)
        identity.write_text(json.dumps({"lineage_hash": "other" if len(waited) == 1 else "mine"}))

    monkeypatch.setattr("time.sleep", prepared)
    about = {"stage": "avid", "directory": tmp_path, "parents": {}, "rerun": False}
    _wait_for_main_process(SimpleNamespace(lineage="mine", **about))  # type: ignore[arg-type]
    assert len(waited) == 2
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 * len(waited))
    with pytest.raises(StageError, match="avid: rank 0 did not prepare"):
        _wait_for_main_process(SimpleNamespace(lineage="none", **about))  # type: ignore[arg-type]
    assert len(waited) == 4


MAIN = ({}, BATCH, STEP, {**STEP, "SLURM_JOB_NAME": "bash"}, TORCHRUN, IN_A_JOB)


@pytest.mark.parametrize("variables", [*MAIN, {"LOCAL_RANK": "1"}, {**STEP, "SLURM_PROCID": "3"}, OTHER_NODE])
def test_the_first_process_is_the_main_one(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    under(monkeypatch, **variables)
    assert is_main_process() == (variables in MAIN)


@pytest.mark.parametrize(
    ("devices", "nodes", "variables"),
    [
        (1, 1, {}),
        (8, 1, {}),  # Lightning starts the processes
        ("auto", 1, TORCHRUN),
        ([0, 2], 1, STEP),
        (8, 1, TORCHRUN),
        (8, 1, STEP),
        (8, 4, {**STEP, "SLURM_STEP_NUM_TASKS": "32"}),
        (8, 1, {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NAME": "bash"}),  # a shell inside an srun step
    ],
)
def test_as_many_as_are_wanted(
    devices: object, nodes: int, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    under(monkeypatch, **variables)
    require_processes({"devices": devices, "num_nodes": nodes})
    assert {name: os.environ[name] for name in variables} == variables


@pytest.mark.parametrize(
    ("devices", "nodes", "variables", "started"),
    [
        (1, 1, TORCHRUN, 8),  # would train eight times in one folder
        (1, 1, STEP, 8),
        (8, 4, BATCH, 1),  # a batch script that doesn't use srun
        (8, 4, {**BATCH, "SLURM_NTASKS": "32"}, 1),
        (8, 4, {}, 1),
        (8, 1, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, 1),  # would use one of eight GPUs
        (7, 1, TORCHRUN, 8),
    ],
)
def test_other_numbers_are_refused(
    devices: int, nodes: int, variables: dict[str, str], started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    under(monkeypatch, **variables)
    with pytest.raises(StageError) as caught:
        require_processes({"devices": devices, "num_nodes": nodes})
    begins = f"{started} process{'es were' if started > 1 else ' was'} started, but the configuration needs"
    assert str(caught.value).startswith(f"{begins} {devices * nodes}: --trainer.devices {devices}")


def test_a_batch_script_leaves_one_node_to_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is the job's only task. Otherwise Lightning would expect eight tasks, and leave 7 GPUs idle."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    for tasks in ("1", "8"):
        under(monkeypatch, **{**BATCH, "SLURM_NTASKS": tasks})
        assert SLURMEnvironment.detect()
        require_processes({"devices": 8, "num_nodes": 1})
        assert not SLURMEnvironment.detect()


def test_lightning_recommends_no_srun_and_no_callbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def build_and_load() -> None:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        call._call_callbacks_on_load_checkpoint(trainer, {"callbacks": {"ours": 1}, "pytorch-lightning_version": "2"})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="srun"):
            build_and_load()
        quiet_lightning()
        build_and_load()


def test_several_processes_of_a_shell_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would start all processes again, since Lightning goes by the job name, which srun sets to `bash`."""
    under(monkeypatch, **{**STEP, "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "3"})
    with pytest.raises(StageError, match="give srun another --job-name"):
        require_processes({"devices": 8, "num_nodes": 1})


CODE = """
import sys
from assemble.stages.lightning_workarounds import import_lightning
import_lightning()
import papers.avid_cma.data, papers.avid_cma.module
import assemble.stages.cli, assemble.stages.loggers, assemble.stages.telemetry, common.training.callbacks
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"matplotlib", "scipy", "sklearn", "transformers", "wandb"}))
from lightning_utilities.core.imports import RequirementCache, package_available
print(bool(RequirementCache("scipy>=1")), package_available("scipy"))
"""


def test_a_stage_begins_without_plots_scipy_and_transformers() -> None:
    """The packages that are not imported at the start can still be imported later."""
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project_root(), timeout=LONG, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "True True"]


def test_a_stage_leaves_nothing_of_the_one_before_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    instantiate = StageCLI.instantiate_trainer

    def remembered(self: StageCLI, **options: Any) -> Any:
        trainer = instantiate(self, **options)
        made.append(weakref.ref(trainer))
        return trainer

    monkeypatch.setattr(StageCLI, "instantiate_trainer", remembered)
    for number in range(3):
        run_stage(request("mct/moco_v2", tmp_path / str(number)))
    assert [trainer() is None for trainer in made[:-1]] == [True, True]
    # From Lightning, only the message that a rank died is shown.
    names = ("pytorch", "fabric", "fabric.strategies.launchers.subprocess_script")
    levels = [logging.getLogger(f"lightning.{name}").level for name in names]
    assert levels == [logging.ERROR, logging.ERROR, logging.INFO]
