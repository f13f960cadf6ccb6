"""Check that a stage learns the miniature's region features, computes them once, and reads them as usual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.datasets.coco_cn import COCOCN
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.media import MediaError
from papers.m3p import regions
from papers.m3p.regions import RegionNetwork, prepare_regions, read_region_network, region_boxes, region_rows
from tests.data.image_layouts import COCO, write_coco_cn, write_coco_karpathy
from tests.m3p.stages import region_network

CLASSES, WIDTH = 60, 64


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    return region_network(tmp_path)


@pytest.fixture
def dataset(tmp_path: Path) -> COCOKarpathy:
    return COCOKarpathy(write_coco_karpathy(tmp_path / "coco"), restval=True)


def test_the_five_boxes_cover_the_picture_once_and_its_quarters_once() -> None:
    boxes = region_boxes(31, 44)
    assert boxes[0].tolist() == [0, 0, 44, 31]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert areas[1:].sum() == areas[0] == 44 * 31


def test_features_are_those_of_the_network(checkpoint: Path, dataset: COCOKarpathy) -> None:
    for split in ("train", "test"):
        dataset.regions_root = prepare_regions(dataset, split, checkpoint)
    network = read_region_network(checkpoint)
    expected = dict(region_rows(network, [(key, dataset.image_path(key, "train")) for key in COCO]))
    for split, keys in (("train", COCO[:2]), ("test", COCO[2:])):
        found = dataset.regions(split)
        assert list(found.keys) == list(keys)
        assert found.feature_size == WIDTH
        for key in keys:
            np.testing.assert_allclose(found[key].features, expected[key].features, atol=1e-5)
            own = found[key]
            assert own.distribution is not None
            assert own.distribution.shape == (5, CLASSES + 1)
            assert (own.labels == own.distribution.argmax(1)).all()
            assert (own.labels >= 1).all()
            assert (own.height, own.width) == (20, 24)


def test_features_are_made_once(
    checkpoint: Path, dataset: COCOKarpathy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_regions(dataset, "train", checkpoint)
    asked: list[Any] = []

    def counting(network: RegionNetwork, pictures: Any) -> Any:
        pictures = list(pictures)
        asked.append([key for key, _ in pictures])
        return region_rows(network, pictures)

    monkeypatch.setattr(regions, "region_rows", counting)
    assert prepare_regions(dataset, "train", checkpoint) == folder
    assert asked == []
    # A data set of the same pictures reuses the features, and adds only those of its other splits.
    chinese = COCOCN(write_coco_cn(tmp_path / "coco_cn"), dataset.root)
    assert prepare_regions(chinese, "train", checkpoint) == folder
    assert asked == []
    few = COCOKarpathy(dataset.root)
    other = prepare_regions(few, "test", checkpoint)
    assert other == folder
    assert asked == [[COCO[2]]]
    copy = tmp_path / "copy.ckpt"
    content = torch.load(checkpoint, weights_only=False)
    content["state_dict"]["network.classifier.bias"] += 1
    torch.save(content, copy)
    assert prepare_regions(dataset, "train", copy) != folder


def test_a_picture_that_cannot_be_read_is_named(checkpoint: Path, dataset: COCOKarpathy, tmp_path: Path) -> None:
    path = dataset.image_path(COCO[0], "train")
    path.write_bytes(b"no picture")
    with pytest.raises(MediaError, match=path.name):
        prepare_regions(dataset, "train", checkpoint)
    assert not list((tmp_path / "cache").rglob("*.npz"))
