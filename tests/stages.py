"""Run stages at the smoke scale from tests."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from assemble.stages.request import Selection, StageRequest, find_request
from common.files import lock


def request(
    name: str, runs: Path, *arguments: str, seed: int = 0, layer: dict[str, Any] | None = None, scale: str = "smoke"
) -> StageRequest:
    """Return the stage `<paper>/<name>` in a folder of runs, with overrides and one more YAML layer."""
    if layer is not None:
        path = runs / "layer.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(layer), encoding="utf-8")
        arguments = (*arguments, "--config", str(path))
    selection = Selection(scale=scale, seeds=(seed,), runs=runs, data=runs / "no-data")
    return find_request(name, selection, arguments)


@contextmanager
def shared(name: str) -> Iterator[Path]:
    """Lock a shared folder of runs, so that only one process trains in the folder. Later tests only read it."""
    folder = Path(os.environ["ASSEMBLE_TESTS"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as file:
        lock(file)
        yield folder / "runs"


def callbacks(every_n_train_steps: int) -> list[dict[str, Any]]:
    """Return the callbacks of configs/trainer.yaml with another checkpoint interval."""
    path = Path(__file__).resolve().parents[1] / "configs" / "trainer.yaml"
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]["callbacks"]
    assert listed[-1]["class_path"].endswith("ModelCheckpoint")
    listed[-1]["init_args"]["every_n_train_steps"] = every_n_train_steps
    return listed


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the curves of a metrics file: name -> [(step, value), ...]."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return curves
