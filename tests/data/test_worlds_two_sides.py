"""The worlds with a thing on either side, on disk: COCO's layout, true annotations, captions that say what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.data.datasets.coco_2014 import COCO2014
from common.data.worlds.base import World
from common.data.worlds.emoji_scenes import EmojiScenesWorld
from common.data.worlds.two_objects import TwoObjectsWorld
from common.data.worlds.two_sides import TwoSidesWorld
from tests.data.worlds import read_caption, tiny

# Attributes of some picture.
SHOWN = {TwoObjectsWorld: (0, 1, 2, 3, 0), EmojiScenesWorld: (0, 6, 2)}
every_kind = pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: kind.kind)


@every_kind
def test_the_reader_finds_captions_and_the_true_attributes(
    kind: type[TwoSidesWorld], rendered: Callable[[type[World]], Any]
) -> None:
    world = rendered(kind)
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
            assert {read_caption(text, kind) for text in captions} == {tuple(found[row].tolist())}
        for row, clip in enumerate(listing):
            assert (np.asarray(Image.open(clip.path)) == drawn.images[row]).all()


@every_kind
def test_relations_replace_a_share_of_the_captions(kind: type[TwoSidesWorld], tmp_path: Path) -> None:
    shown = SHOWN[kind]
    texts = [text for row in range(50) for text in tiny(kind, tmp_path, relations=0.5).captions("train", row, shown)]
    related = [text for text in texts if " of a " in text]
    assert 0.4 < len(related) / len(texts) < 0.6
    assert {read_caption(text, kind) for text in texts} == {shown}
