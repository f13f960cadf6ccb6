"""Run the main stage of each paper and its parents at the smoke scale, once for all tests."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from assemble.stages.plan import plan_stages
from assemble.stages.request import Selection, StageRequest
from assemble.stages.run import run_stage
from tests.stages import shared

#: The stage of each paper whose trained model the commands use.
MAIN = {"avid_cma": "avid", "mct": "mct", "m3p": "m3p", "vx2text": "avsd", "xmc_gan": "xmc_gan"}


def _stages(paper: str, runs: Path) -> list[StageRequest]:
    selection = Selection("smoke", runs=runs, data=runs / "no-data", stages=(MAIN[paper],))
    return [item.request for item in plan_stages(paper, selection)]


@functools.cache
def finished(paper: str) -> list[StageRequest]:
    """Train a paper's stages if necessary, and return them with the main stage last."""
    with shared(paper) as runs:
        stages = _stages(paper, runs)
        for stage in stages:
            run_stage(stage, unless_done=True)
    return stages


def checkpoint(paper: str) -> Path:
    """Return `last.ckpt` of the main stage, trained for a few steps."""
    return finished(paper)[-1].checkpoint()


def copied_avid(runs: Path) -> StageRequest:
    """Copy AVID's finished stage into another folder of runs, and return the copied stage."""
    shutil.copytree(finished("avid_cma")[-1].runs, runs, dirs_exist_ok=True)
    return _stages("avid_cma", runs)[-1]
