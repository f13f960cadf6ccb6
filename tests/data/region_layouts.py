"""Tiny files of region features, in the layouts in which real ones are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common.data.regions import Regions

HEIGHT, WIDTH, FEATURES, CLASSES = 30, 40, 6, 5


def regions(number: int, count: int = 3, distribution: bool = False) -> Regions:
    """Regions whose content depends on the number."""
    rng = np.random.default_rng(number)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * (WIDTH, HEIGHT)
    shares = rng.dirichlet(np.ones(CLASSES), count).astype(np.float32)
    return Regions(
        rng.normal(size=(count, FEATURES)).astype(np.float32),
        corners.reshape(count, 4).astype(np.float32),
        shares.argmax(1).astype(np.int64),
        HEIGHT,
        WIDTH,
        shares if distribution else None,
    )


def columns(names: Sequence[str], found: Sequence[Regions], old: bool = False, most: int = 4) -> dict[str, Any]:
    """What a packed file holds; `old` = with the names and the distribution of the older files."""

    def padded(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([np.concatenate([v, np.zeros((most - len(v), *v.shape[1:]), v.dtype)]) for v in values])

    held = {
        "image_id": np.array([name.encode() for name in names]),
        "wh": np.array([(own.height, own.width) for own in found]),
        "num_boxes": np.array([len(own) for own in found]),
        "boxes" if old else "bbox": padded([own.boxes for own in found]),
        "features": padded([own.features for own in found]),
    }
    if old:
        held["distribution"] = padded([np.asarray(own.distribution) for own in found])
    else:
        held["objects"] = padded([own.labels for own in found])
    return held


def write_columns(path: Path, held: dict[str, Any]) -> Path:
    """Write a packed file by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **held)
    else:
        with h5py.File(path, "w") as file:
            for name, values in held.items():
                file[name] = values
    return path
