"""The worlds with a thing on either side, on disk: COCO's layout, true annotations, captions that say what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.data.datasets.coco_2014 import COCO2014
from common.data.worlds.base import World
from common.data.worlds.emoji import CREDIT, STYLES, pack
from common.data.worlds.emoji_scenes import EmojiScenesWorld
from common.data.worlds.two_objects import TwoObjectsWorld
from common.data.worlds.two_sides import GROUNDS, TwoSidesWorld
from tests.data.worlds import digest, read_caption, tiny

KINDS = [TwoObjectsWorld, EmojiScenesWorld]
every_kind = pytest.mark.parametrize("kind", KINDS)
# Attributes of some picture.
SHOWN = {TwoObjectsWorld: (0, 1, 2, 3, 0), EmojiScenesWorld: (0, 6, 2)}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.kind)
def world(request: pytest.FixtureRequest, rendered: Callable[[type[World]], Any]) -> TwoSidesWorld:
    return rendered(request.param)


# -- both --------------------------------------------------------------------------------------------------------------


def test_the_reader_finds_captions_and_the_true_attributes(world: TwoSidesWorld) -> None:
    dataset = COCO2014(world.root_of("coco_2014"))
    for split, count in (("train", 40), ("val", 24)):
        listing = dataset.listing(split)
        assert (len(listing), listing.missing, listing.notes) == (count, 0, ())
        known = dataset.annotations(split, listing)
        drawn = world.draw(split, range(count))
        found = world.attributes_of(known)
        assert found.dtype == np.int64
        assert (found == drawn.attributes).all()
        for row, captions in enumerate(known.captions):
            assert {read_caption(text, type(world)) for text in captions} == {tuple(found[row].tolist())}
        for row, clip in enumerate(listing):
            assert (np.asarray(Image.open(clip.path)) == drawn.images[row]).all()


@every_kind
def test_things_stay_in_their_halves_on_the_named_ground(kind: type[TwoSidesWorld]) -> None:
    drawn = kind().draw("val", range(60))
    grounds = np.array(list(GROUNDS.values()))
    for image, attributes, boxes in zip(drawn.images, drawn.attributes, drawn.boxes):
        assert np.abs(image[0, 16] / 255 - grounds[attributes[-1]]).max() < 0.06
        for side, (left, top, right, bottom) in enumerate(boxes):
            assert 16 * side - 0.5 <= left < right <= 16 * side + 16.5
            assert 0 <= top < bottom <= 32
            # The box is tight: nothing but ground within the half and outside of it.
            half = image[:, 16 * side + 1 : 16 * side + 15].astype(int)
            outside = np.ones((32, 14), dtype=bool)
            across = np.arange(16 * side + 1, 16 * side + 15) + 0.5
            down = np.arange(32) + 0.5
            outside[np.ix_((down > top - 1) & (down < bottom + 1), (across > left - 1) & (across < right + 1))] = False
            assert (half[outside] == image[0, 16]).all()


@every_kind
def test_relations_replace_a_share_of_the_captions(kind: type[TwoSidesWorld], tmp_path: Path) -> None:
    shown = SHOWN[kind]
    texts = [text for row in range(50) for text in tiny(kind, tmp_path, relations=0.5).captions("train", row, shown)]
    related = [text for text in texts if " of a " in text]
    assert 0.4 < len(related) / len(texts) < 0.6
    assert {read_caption(text, kind) for text in texts} == {shown}


def test_attributes_of_other_pictures_are_refused(world: TwoSidesWorld) -> None:
    known = COCO2014(world.root_of("coco_2014")).annotations("val")
    other = replace(known, tags=known.tags[:, :2], tag_names=("person", "dog"))
    with pytest.raises(ValueError, match=rf"only pictures of the {world.title} .*person, dog"):
        world.attributes_of(other)


# -- two objects -------------------------------------------------------------------------------------------------------


def test_two_objects_are_those_of_the_records(tmp_path: Path) -> None:
    world = TwoObjectsWorld(train=20, test=10, relations=0.3, root=str(tmp_path))
    world.prepare()
    assert world.folder.name == "two-objects-3b4306075793e66c"
    # What a picture shows and what is said of it; pixels come of floating point, which processors may round otherwise.
    hashes = digest(world.root_of("coco_2014"), {".json"})
    assert hashes["annotations/captions_train2014.json"].startswith("7c9ff05fd11145cc")
    assert hashes["annotations/captions_val2014.json"].startswith("7699f295f3d0f698")
    assert world.draw("val", range(1)).images[0, 16].astype(int).sum(0) == pytest.approx([5878, 4688, 3639], abs=3)


# -- emoji scenes ------------------------------------------------------------------------------------------------------


def test_designers_are_credited_and_each_draws_a_quarter() -> None:
    world = EmojiScenesWorld()
    assert world.credit == CREDIT
    assert CREDIT in world.description
    assert world.licences == tuple(STYLES.values())
    assert (pack() / "ATTRIBUTION.md").is_file()
    for split in ("train", "val"):
        counts = np.bincount(world.draw(split, range(800)).licences, minlength=4)
        assert counts.min() > 0.8 * 200
