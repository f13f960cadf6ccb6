"""The world of two objects on disk: COCO's layout, true annotations, captions that say what is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.data.annotations import ImageAnnotations
from common.data.datasets.coco_2014 import COCO2014
from common.data.worlds.base import World
from common.data.worlds.two_objects import (
    ATTRIBUTE_SIZES,
    CATEGORIES,
    COLOURS,
    GROUNDS,
    TwoObjectsWorld,
    attributes_of,
)
from tests.data.worlds import read_caption, tiny


@pytest.fixture(scope="module")
def world(rendered: Callable[[type[World]], Any]) -> TwoObjectsWorld:
    return rendered(TwoObjectsWorld)


def test_files_lie_as_in_coco_2014(world: TwoObjectsWorld) -> None:
    root = world.root_of("coco_2014")
    for split, count in (("train", 40), ("val", 24)):
        captions = json.loads((root / "annotations" / f"captions_{split}2014.json").read_text())
        names = sorted(path.name for path in (root / f"{split}2014").iterdir())
        assert len(names) == count
        assert all(re.fullmatch(rf"COCO_{split}2014_\d{{12}}\.png", name) for name in names)
        assert [entry["file_name"] for entry in captions["images"]] == names
        assert len(captions["annotations"]) == 8 * count


def test_the_reader_finds_captions_and_the_true_attributes(world: TwoObjectsWorld) -> None:
    dataset = COCO2014(world.root_of("coco_2014"))
    for split, count in (("train", 40), ("val", 24)):
        listing = dataset.listing(split)
        assert (len(listing), listing.missing, listing.notes) == (count, 0, ())
        known = dataset.annotations(split, listing)
        drawn = world.draw(split, range(count))
        found = attributes_of(known)
        assert found.dtype == np.int64
        assert (found == drawn.attributes).all()
        for row, captions in enumerate(known.captions):
            assert {read_caption(text) for text in captions} == {tuple(found[row].tolist())}
        for row, clip in enumerate(listing.clips):
            assert (np.asarray(Image.open(clip.path)) == drawn.images[row]).all()


def test_colours_in_the_boxes_are_those_that_are_named(world: TwoObjectsWorld) -> None:
    drawn = world.draw("val", range(24))
    colours, grounds = np.array(list(COLOURS.values())), np.array(list(GROUNDS.values()))
    for image, attributes, boxes, areas in zip(drawn.images, drawn.attributes, drawn.boxes, drawn.areas):
        assert np.abs(image[0, 16] / 255 - grounds[attributes[4]]).max() < 0.06
        for side in range(2):
            left, top, right, bottom = boxes[side]
            assert 16 * side <= left < right <= 16 * side + 16.5
            center = image[int((top + bottom) / 2), int((left + right) / 2)] / 255
            assert np.abs(center - colours[attributes[1 + 2 * side]]).max() < 0.1
            share = areas[side] / ((right - left) * (bottom - top))
            assert share == pytest.approx((np.pi / 4, 1.0, 0.5)[attributes[2 * side]], abs=0.08)


def test_captions_have_13_to_16_tokens_with_their_ends() -> None:
    world = TwoObjectsWorld()
    lengths = {
        len(text.split()) + 2 for row in range(60) for text in world.captions("train", row, (0, 0, 1, 1, row % 3))
    }
    assert lengths == {13, 14, 15, 16}


def test_relations_replace_a_share_of_the_captions(tmp_path: Path) -> None:
    texts = [
        text
        for row in range(50)
        for text in tiny(TwoObjectsWorld, tmp_path, relations=0.5).captions("train", row, (0, 1, 2, 3, 0))
    ]
    related = [text for text in texts if " of a " in text]
    assert 0.4 < len(related) / len(texts) < 0.6
    assert {read_caption(text) for text in texts} == {(0, 1, 2, 3, 0)}


def test_all_values_occur_equally_often() -> None:
    attributes = TwoObjectsWorld().draw("train", range(1200)).attributes
    for column, size in enumerate(ATTRIBUTE_SIZES):
        counts = np.bincount(attributes[:, column], minlength=size)
        assert len(counts) == size
        assert counts.min() > 0.8 * 1200 / size


def test_larger_pictures_show_the_same() -> None:
    small, large = (TwoObjectsWorld(size=size).draw("val", range(20)) for size in (32, 64))
    assert (small.attributes == large.attributes).all()
    halved = large.images.reshape(20, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(halved - small.images).mean() < 3


def test_attributes_of_other_pictures_are_refused(world: TwoObjectsWorld) -> None:
    known = COCO2014(world.root_of("coco_2014")).annotations("val")

    def changed(**changes: Any) -> ImageAnnotations:
        fields = {name: getattr(known, name) for name in known.__dataclass_fields__}
        return ImageAnnotations(**{**fields, **changes})

    other = changed(tags=known.tags[:, :2], tag_names=("person", "dog"))
    with pytest.raises(ValueError, match=r"only pictures of the world of two objects.*person, dog"):
        attributes_of(other)
    boxes = known.boxes()
    lost = [{name: values[1:] for name, values in boxes[0].items()}, *boxes[1:]]
    with pytest.raises(ValueError, match="has 2 instances where two objects and a ground"):
        attributes_of(changed(read_boxes=lambda _: lost))
    grounds = [{**boxes[0], "labels": np.full(3, len(CATEGORIES) - 1)}, *boxes[1:]]
    with pytest.raises(ValueError, match="another number of objects"):
        attributes_of(changed(read_boxes=lambda _: grounds))
