"""Build stages of M3P at the smoke scale with an untrained region network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from assemble.stages.request import StageRequest
from papers.m3p.miniature import RegionClassifier
from tests.stages import request


def region_network(folder: Path) -> Path:
    """Write a checkpoint like the one that the stage `regions` writes."""
    torch.manual_seed(0)
    module = RegionClassifier(classes=60, channels=(4, 4, 8, 64), side=32)
    path = folder / "regions.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return path


def stage(recipe: str, runs: Path, *arguments: str, layer: dict[str, Any] | None = None) -> StageRequest:
    """Return a stage of the recipe that starts from random weights."""
    given = ["--data.region_network", str(region_network(runs.parent / "network")), "--model.pretrained", "null"]
    return request(f"m3p/{recipe}", runs, *given, *arguments, layer=layer)
