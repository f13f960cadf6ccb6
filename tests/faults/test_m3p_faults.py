"""Wrong input to M3P's data stops before training and says what to do; what is missing or damaged is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.data.item_dataset import TooManyBrokenFiles
from tests.m3p.layouts import Layouts, pictures_of, write_features


@pytest.fixture
def layouts(tmp_path: Path) -> Layouts:
    """Data sets of our own, to be damaged."""
    return Layouts.write(tmp_path / "data")


def test_images_without_regions_are_left_out_and_counted(layouts: Layouts) -> None:
    folder = layouts.root / "multi30k"
    (folder / "regions/train.npz").unlink()
    write_features(folder, "train", [f"train_{number}" for number in range(10)])
    data = layouts.retrieval(max_skipped_fraction=0.2, batch_size=10)
    shown = {n for step in data.train_dataloader() for n in pictures_of(step["relations"][0]["t2i"])}
    assert shown == set(range(10))
    described = data.describe()["training (multi30k)"]
    assert (described["samples"], described["without_regions"]) == (10, 2)
    with pytest.raises(TooManyBrokenFiles, match=r"2 of 12 images have no region features in .*train\.npz.*train_10"):
        layouts.retrieval(max_skipped_fraction=0.1)
