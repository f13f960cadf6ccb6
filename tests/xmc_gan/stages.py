"""Run stages of XMC-GAN at the smoke scale, once for all tests."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from assemble.reporting.records import Record
from assemble.stages.run import run_stage
from tests.stages import request, shared

#: Arguments for a stage without the networks that other stages train.
WITHOUT_PARENTS = ["--model.image_network.pretrained", "null", "--model.evaluation.evaluator.pretrained", "null"]
NAMES = ("mini_evaluator", "mini_image_network", "real_images", "xmc_gan", "baseline")


@dataclass(frozen=True)
class Stages:
    """The folder of the runs, and the record of each stage."""

    runs: Path
    records: dict[str, Record]

    def folder(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.runs / "xmc_gan" / "smoke" / "seed0" / name

    def checkpoint(self, name: str) -> Path:
        """Return the last checkpoint of a stage."""
        return self.folder(name) / "checkpoints" / "last.ckpt"


@functools.cache
def finished() -> Stages:
    """Train two rows of the ablation and their parents for two steps."""
    with shared("xmc_gan") as runs:
        return Stages(runs, {name: run_stage(request(f"xmc_gan/{name}", runs), unless_done=True) for name in NAMES})
