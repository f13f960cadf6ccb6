"""A paper that lacks an optional file is told so by name."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from common.reporting.papers import project_root
from common.stages.cli import StageCLI
from common.stages.run import run_stage
from tests.machine import LONG
from tests.stages import request

CODE = """
import sys
from common.stages.lightning_import import import_lightning
import_lightning()
import papers.avid_cma.data, papers.avid_cma.module
import common.stages.cli, common.stages.loggers, common.stages.telemetry, common.training.callbacks
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"matplotlib", "scipy", "sklearn", "transformers", "wandb"}))
from lightning_utilities.core.imports import RequirementCache, package_available
print(bool(RequirementCache("scipy>=1")), package_available("scipy"))
"""


def test_a_stage_begins_without_plots_scipy_and_transformers() -> None:
    """What is left out is there again for whoever asks for it later."""
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
