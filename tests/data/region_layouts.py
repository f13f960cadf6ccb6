"""Regions of made-up pictures."""

from __future__ import annotations

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
