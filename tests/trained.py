"""One finished stage of each paper at the smoke scale, run once for all tests."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from assemble.stages.request import StageRequest
from assemble.stages.run import run_stage
from tests.m3p import stages as m3p
from tests.stages import request, shared
from tests.vx2text import stages as vx2text
from tests.xmc_gan import stages as xmc_gan


def _stage(paper: str, runs: Path) -> StageRequest:
    if paper == "m3p":
        return m3p.stage("m3p", runs)
    if paper == "vx2text":
        return request("vx2text/avsd", runs, *vx2text.WITHOUT_PARENTS)
    return request({"avid_cma": "avid/avid", "mct": "mct/mct"}[paper], runs)


@functools.cache
def checkpoint(paper: str) -> Path:
    """`last.ckpt` of a stage that can be used, trained for a few steps."""
    if paper == "xmc_gan":
        return xmc_gan.finished().checkpoint("xmc_gan")
    with shared(paper) as runs:
        stage = _stage(paper, runs)
        run_stage(stage, unless_done=True)
    return stage.directory / "checkpoints" / "last.ckpt"


def copied_avid(runs: Path) -> StageRequest:
    """AVID's finished stage in another folder of runs."""
    shutil.copytree(checkpoint("avid_cma").parents[5], runs, dirs_exist_ok=True)
    return _stage("avid_cma", runs)
