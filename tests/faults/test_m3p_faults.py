"""Wrong input to M3P's data stops before training and says what to do; what is missing or damaged is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.data.item_dataset import TooManyBrokenFiles
from common.data.listing import DatasetMissing
from common.data.regions import write_regions
from tests.m3p.layouts import Layouts, pictures_of, regions_of, write_features


@pytest.fixture
def layouts(tmp_path: Path) -> Layouts:
    """Data sets of our own, to be damaged."""
    return Layouts.write(tmp_path / "data")


def _remove(path: Path) -> None:
    path.unlink()


def _blank(path: Path) -> None:
    path.write_bytes(b"\n \n")


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"),
    [
        ("dictionaries/en-fr.txt", _remove, ValueError, r"en-fr\.txt: No such file"),
        ("dictionaries/en-fr.txt", _blank, ValueError, r"en-fr\.txt: holds no pairs"),
        ("conceptual_captions/regions/train.npz", _remove, DatasetMissing, "--extract-regions"),
        ("multi30k/data/task1/raw/test_2016_flickr.cs.gz", _remove, DatasetMissing, r"test_2016_flickr\.cs\.gz"),
        ("multi30k/data/task1/raw/train.cs.gz", _remove, None, ""),
    ],
)
def test_before_pretraining(
    layouts: Layouts, name: str, damage: Callable[[Path], None], error: type[Exception] | None, message: str
) -> None:
    damage(layouts.root / name)
    options = {"languages": ["cs", "de", "en", "fr"], "code_switching": layouts.switcher()}
    if error is None:  # what pre-training does not read
        layouts.pretraining(**options)
        return
    with pytest.raises(error, match=message):
        layouts.pretraining(**options)


def test_a_tokenizer_that_is_missing_or_damaged(layouts: Layouts) -> None:
    tokenizer = layouts.tokenizer
    path = Path(str(tokenizer.file))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="vocabulary: "):
        layouts.pretraining(tokenizer=tokenizer)
    tokenizer.file = str(path.with_name("nothing.model"))
    with pytest.raises(FileNotFoundError, match="set model to null to learn one"):
        layouts.pretraining(tokenizer=tokenizer)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 13}, r"data\.batch_size \(13\) is larger than the 12 captions of conceptual_captions"),
        ({"text": None}, r"data\.text is null, but data\.xmlm_steps is above 0"),
        ({"test_sets": ["multi30k_xx"]}, r"data\.test_sets: no set multi30k_xx; data\.sets has multi30k_en"),
    ],
)
def test_numbers_that_do_not_fit(layouts: Layouts, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layouts.pretraining(**options)


def test_processes_share_a_batch_evenly(layouts: Layouts) -> None:
    with pytest.raises(ValueError, match=r"data\.text_batch_size \(3\)"):
        layouts.pretraining(world_size=2, text_batch_size=3).train_dataloader()


def test_regions_of_another_width_or_without_distributions(layouts: Layouts) -> None:
    found = regions_of(0, False)
    (layouts.root / "conceptual_captions/regions/train.npz").unlink()
    plain = type(found)(found.features, found.boxes, found.labels, found.height, found.width)
    write_regions(layouts.root / "conceptual_captions/regions/train.npz", [(str(n), plain) for n in range(12)])
    with pytest.raises(ValueError, match=r"data\.distributions"):
        next(iter(layouts.pretraining(distributions=True).train_dataloader()))
    (layouts.root / "multi30k/regions/test.npz").unlink()
    wide = type(found)(found.features[:, :4], found.boxes, found.labels, found.height, found.width)
    write_regions(layouts.root / "multi30k/regions/test.npz", [(f"test_{number}", wide) for number in range(5)])
    with pytest.raises(ValueError, match=r"must be of one width, found \[4, 6\]"):
        layouts.retrieval()
