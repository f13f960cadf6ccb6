"""The renderer of glyph scenes: outlines, coverage, places, and what an annotation says about the pixels."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from common.data.worlds.glyphs import (
    COLOUR_NAMES,
    COLOURS,
    GLYPHS,
    LARGE_RADIUS,
    OUTLINES,
    SMALL_RADIUS,
    Copy,
    Scene,
    coverage,
    dark_ground,
    draw,
    mixed_scene,
    place,
    repeated_scene,
)


def area(ring: np.ndarray) -> float:
    """Signed area of a closed path; positive when it runs clockwise on the screen."""
    x, y = ring.T
    return 0.5 * float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def one(glyph: str, radius: float = 0.3, rotation: float = 0.0, center: tuple[float, float] = (0.5, 0.5)) -> Scene:
    return Scene((Copy(GLYPHS.index(glyph), center, radius, rotation, (1.0, 1.0, 1.0)),), (0.0, 0.0, 0.0))


def clean(scene: Scene, size: int = 32) -> np.ndarray:
    return draw(scene, np.random.default_rng(0), size, gradient=0.0, noise=0.0).image


@pytest.mark.parametrize("glyph", GLYPHS)
def test_outlines_fit_their_circle_and_holes_run_the_other_way(glyph: str) -> None:
    outer, *holes = OUTLINES[glyph]
    for ring in (outer, *holes):
        assert np.hypot(*ring.T).max() <= 1 + 1e-9
    assert area(outer) > 0
    assert all(area(hole) < 0 for hole in holes)
    # None is a speck beside another.
    assert 1.0 < sum(area(ring) for ring in (outer, *holes)) < np.pi


@settings(max_examples=40, deadline=None)
@given(
    glyph=st.sampled_from(GLYPHS),
    x=st.floats(12, 20),
    y=st.floats(12, 20),
    radius=st.floats(3, 11),
    turn=st.floats(0, 6.3),
)
def test_coverage_adds_up_to_the_area(glyph: str, x: float, y: float, radius: float, turn: float) -> None:
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    rings = [np.array([x, y]) + radius * ring @ rotation for ring in OUTLINES[glyph]]
    covered = coverage([rings], 32)
    assert covered.shape == (1, 32, 32)
    assert covered.min() >= 0
    assert covered.max() <= 1
    expected = radius**2 * sum(area(ring) for ring in OUTLINES[glyph])
    # Rows are sampled eight times a pixel, so a level edge is off by up to a sixteenth of its length.
    assert covered.sum() == pytest.approx(expected, rel=0.03, abs=radius / 4)


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


def test_a_hole_shows_the_ground() -> None:
    for glyph in ("ring", "frame"):
        assert clean(one(glyph))[16, 16].tolist() == [0, 0, 0]
    for glyph in ("circle", "square"):
        assert clean(one(glyph))[16, 16].tolist() == [255, 255, 255]


def test_rotation_turns_clockwise() -> None:
    arrow = clean(one("arrow", 0.4, np.pi / 2))[..., 0] > 127
    upright = clean(one("arrow", 0.4))[..., 0] > 127
    assert (arrow == np.rot90(upright, -1)).mean() > 0.98


def test_a_scene_looks_the_same_at_every_size() -> None:
    scene, _ = repeated_scene(np.random.default_rng(3), 8)
    small = clean(scene, 32).astype(float)
    large = clean(scene, 128).astype(float).reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - large).mean() < 1.5
    quarter = draw(scene, np.random.default_rng(0), 128).boxes / 4
    np.testing.assert_allclose(draw(scene, np.random.default_rng(0), 32).boxes, quarter, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), glyph=st.sampled_from([None, *range(len(GLYPHS))]))
def test_a_repeated_scene_is_what_its_attributes_say(seed: int, glyph: int | None) -> None:
    rng = np.random.default_rng(seed)
    scene, said = repeated_scene(rng, glyph)
    assert glyph is None or said.glyph == glyph
    assert len(scene.copies) == said.count in (2, 3, 4)
    assert said.ground != said.colour
    assert scene.ground == dark_ground(said.ground)
    for copy in scene.copies:
        assert copy.glyph == said.glyph
        assert copy.colour == COLOURS[COLOUR_NAMES[said.colour]]
        assert copy.radius == (LARGE_RADIUS if said.large else SMALL_RADIUS)
        assert abs(copy.rotation) <= 0.2
    picture = draw(scene, rng)
    assert (picture.image.shape, picture.image.dtype) == ((32, 32, 3), np.uint8)
    assert picture.coverage.shape == (said.count, 32, 32)
    assert picture.coverage.sum(axis=0).max() <= 1.26  # copies may touch inside a pixel but not overlap
    for copy, box in zip(scene.copies, picture.boxes):
        center, reach = 32 * np.array(copy.center), 32 * copy.radius
        assert (box[:2] >= center - reach - 1e-4).all()
        assert (box[2:] <= center + reach + 1e-4).all()
    assert picture.boxes.min() >= -1e-4
    assert picture.boxes.max() <= 32 + 1e-4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_boxes_and_polygons_enclose_the_drawn_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = repeated_scene(rng)[0] if seed % 2 else mixed_scene(rng)
    picture = draw(scene, rng, 64)
    for covered, box, polygon in zip(picture.coverage, picture.boxes, picture.polygons):
        rows, columns = np.nonzero(covered > 0.02)
        tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(tight - box).max() <= 1.0
        encoded = coco_mask.frPyObjects([polygon.reshape(-1).tolist()], 64, 64)
        inside = coco_mask.decode(coco_mask.merge(encoded)).astype(bool)
        drawn = covered > 0.5
        assert (inside & drawn).sum() / (inside | drawn).sum() > 0.75  # bars are six pixels wide


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), radii=st.lists(st.sampled_from([5.2 / 32, 6.6 / 32, 0.1]), max_size=4))
def test_places_do_not_overlap(seed: int, radii: list[float]) -> None:
    centers = place(np.random.default_rng(seed), radii)
    assert centers.shape == (len(radii), 2)
    for first, (one_center, radius) in enumerate(zip(centers, radii)):
        assert ((one_center >= radius) & (one_center <= 1 - radius)).all()
        for other, other_radius in zip(centers[first + 1 :], radii[first + 1 :]):
            assert np.linalg.norm(one_center - other) >= radius + other_radius


def test_a_scene_of_own_copies_can_be_drawn() -> None:
    """Free colours, light grounds, later copies in front: what captioned scenes with relations need."""
    back = Copy(GLYPHS.index("square"), (0.4, 0.5), 0.3, 0.0, (1.0, 0.0, 0.0))
    front = replace(back, center=(0.6, 0.5), colour=(0.0, 0.0, 1.0))
    image = clean(Scene((back, front), (1.0, 1.0, 1.0)))
    assert image[16, 8].tolist() == [255, 0, 0]
    assert image[16, 16].tolist() == image[16, 24].tolist() == [0, 0, 255]
    assert image[1, 1].tolist() == [255, 255, 255]
    faint = clean(Scene((replace(back, opacity=0.5),), (1.0, 1.0, 1.0)))
    assert faint[16, 12].tolist() == [255, 128, 128]
    assert draw(Scene((), (0.5, 0.5, 0.5)), np.random.default_rng(0)).boxes.shape == (0, 4)
