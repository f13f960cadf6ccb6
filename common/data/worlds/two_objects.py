"""A miniature for text-to-image generation: a plain shape in each half, and captions that say what is where."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.data.worlds.two_sides import SIDE, Box, Floats, Things, TwoSidesWorld, rectangle

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (0.9, 0.12, 0.12), "green": (0.12, 0.7, 0.2), "blue": (0.15, 0.25, 0.9), "yellow": (0.95, 0.85, 0.1)}

# Range of the radius, in pixels of a picture of 32.
_RADII = (5.0, 7.0)
_COLOUR_JITTER = 0.06
# In radii: half a square's side, and a triangle's height from base to center. The areas are about equal.
_HALF_SQUARE = 0.88
_TRIANGLE_BASE = 0.62


class TwoObjectsWorld(TwoSidesWorld):
    """Circles, squares and triangles in red, green, blue or yellow. Objects and ground make 432 combinations.

    The attributes of an object are its shape and color. For the arguments see ``TwoSidesWorld``.

    Source: docs/papers/xmc_gan.md [14.1].
    """

    kind = "two-objects"
    title = "world of two objects"
    version = 1
    description = "Two objects side by side"
    licences = ("Apache License 2.0 (generated pictures)",)
    things = tuple((f"{colour} {shape}", shape) for shape in SHAPES for colour in COLOURS)
    thing_sizes = (len(SHAPES), len(COLOURS))
    _numbers = 12

    def _things(self, attributes: npt.NDArray[np.int64], spread: Floats) -> Things:
        scale = self.size / SIDE
        shapes, palette = attributes[:, [0, 2]], np.array(list(COLOURS.values()))
        colour = np.clip(palette[attributes[:, [1, 3]]] + _COLOUR_JITTER * spread[:, :6].reshape(-1, 2, 3), 0, 1)
        radius = scale * (_RADII[0] + (_RADII[1] - _RADII[0]) * (spread[:, 6:8] + 1) / 2)
        center_x, center_y = self._centers(spread[:, 8:])
        pixel = np.arange(self.size) + 0.5
        x = pixel[None, None, None, :] - center_x[:, :, None, None]
        y = pixel[None, None, :, None] - center_y[:, :, None, None]
        coverage = np.clip(0.5 - _distances(shapes, x, y, radius[:, :, None, None]), 0, 1)
        extents = np.array([_extent(shape) for shape in SHAPES])[shapes] * radius[..., None]
        corners = np.stack([center_x, center_y, center_x, center_y], axis=-1) + extents
        return Things(colour[:, :, None, None, :], coverage, corners, [0] * len(attributes))

    def _outline(self, thing: int, box: Box) -> Floats:
        left, top, right, bottom = box
        shape = SHAPES[thing // len(COLOURS)]
        if shape == "square":
            return rectangle(box)
        if shape == "triangle":
            return np.array([((left + right) / 2, top), (right, bottom), (left, bottom)])
        turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        center, half = np.array([left + right, top + bottom]) / 2, np.array([right - left, bottom - top]) / 2
        return center + half * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _distances(shapes: npt.NDArray[np.int64], x: Floats, y: Floats, radius: Floats) -> Floats:
    """Return signed distances [N, 2, size, size] of pixels from the edges of objects, negative inside."""
    circle = np.hypot(x, y) - radius
    square = np.maximum(np.abs(x), np.abs(y)) - _HALF_SQUARE * radius
    # The apex is on top; `steep` is the length of the slanted edges' normals.
    steep = np.hypot(1.0, 1.0 + _TRIANGLE_BASE)
    slanted = (np.abs(x) * (1 + _TRIANGLE_BASE) - (y + radius)) / steep
    triangle = np.maximum(slanted, y - _TRIANGLE_BASE * radius)
    return np.choose(shapes[:, :, None, None], [circle, square, triangle])


def _extent(shape: str) -> tuple[float, float, float, float]:
    """Return the box of a shape around its center, in radii."""
    if shape == "square":
        return (-_HALF_SQUARE, -_HALF_SQUARE, _HALF_SQUARE, _HALF_SQUARE)
    return (-1.0, -1.0, 1.0, 1.0 if shape == "circle" else _TRIANGLE_BASE)
