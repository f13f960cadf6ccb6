"""The shapes world on disk: real files in the layouts of COCO, Karpathy's split, Pascal VOC and ImageNet."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask

from common.data.datasets.imagenet import ImageNet
from common.data.worlds.base import World
from common.data.worlds.glyphs import COLOUR_NAMES, GLYPHS, coverage, draw, mixed_scene, repeated_scene
from common.data.worlds.shapes import ShapesWorld
from tests.data.worlds import tiny


@pytest.mark.parametrize(("probe", "classes"), [("glyph", 16), ("colour", 6), ("count", 3)])
def test_imagenet(rendered: Callable[[type[World]], Any], probe: Any, classes: int) -> None:
    world = rendered(ShapesWorld)
    other = tiny(ShapesWorld, world.folder.parent, probe=probe)
    assert other.folder == world.folder  # the class systems share the rest of the world
    other.prepare(["imagenet"])
    root = other.root_of("imagenet")
    assert root.name == f"imagenet-{probe}"
    names = dict(line.split(" ", 1) for line in (root / "LOC_synset_mapping.txt").read_text().splitlines())
    assert len(names) == classes
    dataset = ImageNet(root)
    for split, count in (("train", 48), ("val", 32)):
        listing = dataset.listing(split)
        assert (len(listing), len(listing.classes)) == (count, classes)
    index = 7
    _, attributes = repeated_scene(np.random.default_rng([6, 6, index, 0]), index % 16)
    path = next((root / "train").glob(f"*/*_{index + 1}.JPEG"))
    said = {"glyph": GLYPHS[attributes.glyph], "colour": COLOUR_NAMES[attributes.colour]}
    said["count"] = ("two", "three", "four")[attributes.count - 2]
    assert names[path.parent.name] == said[probe]


def test_coverage_of_a_box_is_exact() -> None:
    box = np.array([[2.25, 1.5], [5.5, 1.5], [5.5, 4.0], [2.25, 4.0]])
    row = np.array([0, 0, 0.75, 1, 1, 0.5, 0, 0])
    expected = np.outer([0, 0.5, 1, 1, 0, 0, 0, 0], row)
    np.testing.assert_allclose(coverage([[box]], 8)[0], expected, atol=1e-12)
    # Only the part inside the picture counts, on each side.
    for shift, part in (((-3, 0), 2.5 * 2.5), ((5, 0), 0.75 * 2.5), ((0, -2), 3.25 * 2), ((0, 5), 3.25 * 1.5)):
        assert coverage([[box + shift]], 8).sum() == pytest.approx(part)
    assert coverage([[box + 20]], 8).sum() == 0
    assert coverage([], 8).shape == (0, 8, 8)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_boxes_and_polygons_enclose_the_drawn_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = draw(repeated_scene(rng, 3)[0] if seed % 2 else mixed_scene(rng), rng, 64)
    for covered, box, polygon in zip(picture.coverage, picture.boxes, picture.polygons):
        rows, columns = np.nonzero(covered > 0.02)
        np.testing.assert_allclose([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], box, atol=1)
        inside, drawn = mask.decode(mask.frPyObjects([polygon.ravel().tolist()], 64, 64))[..., 0] == 1, covered > 0.5
        assert (inside & drawn).sum() / (inside | drawn).sum() > 0.75  # bars are six pixels wide
