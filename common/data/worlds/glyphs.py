"""Scenes of glyphs: defines sixteen outlines, chooses places and colors, and renders pictures.

A glyph is a set of closed outlines in a circle of radius 1. The outlines determine pictures, masks, boxes and polygons.
Lengths in a scene are fractions of the picture's side, so a scene can be drawn at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RGB = tuple[float, float, float]

GLYPHS = (
    "circle", "ring", "square", "frame", "triangle", "diamond", "plus", "cross",
    "star", "hexagon", "moon", "heart", "arrow", "bar", "tee", "ell",
)  # fmt: skip
COLOURS: dict[str, RGB] = {
    "red": (1.0, 0.25, 0.2),
    "green": (0.25, 0.9, 0.3),
    "blue": (0.3, 0.45, 1.0),
    "yellow": (1.0, 0.9, 0.2),
    "magenta": (0.95, 0.3, 0.9),
    "cyan": (0.25, 0.9, 0.95),
}
COLOUR_NAMES = tuple(COLOURS)

# docs/papers/mct.md [13] gives these lengths in pixels of a 32 x 32 picture.
SMALL_RADIUS, LARGE_RADIUS = 5.2 / 32, 6.6 / 32
COUNTS = (2, 3, 4)
TILT = 0.2
GROUND_SHADE = 0.35
MOST_MIXED, FAINT = 3, 0.06
GRADIENT, NOISE = 0.06, 0.03

_SCANLINES = 8  # sampled lines per row of pixels; along a line the coverage is exact
_ARRANGEMENTS, _TRIES, _ROUNDS = 64, 8, 200


# ------------------------------------------------------------------------------------------------------------ outlines
def _points(*coordinates: tuple[float, float]) -> np.ndarray:
    return np.array(coordinates, dtype=np.float64)


def _arc(radius: float, begin: float, end: float, points: int, center: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Return points of an arc from `begin` to `end`, given in turns, including both ends. Angles grow clockwise."""
    angles = 2 * np.pi * np.linspace(begin, end, points)
    return np.stack([center[0] + radius * np.cos(angles), center[1] + radius * np.sin(angles)], axis=1)


def _regular(corners: int, radius: float, turn: float = 0.0) -> np.ndarray:
    return _arc(radius, turn, turn + 1, corners + 1)[:-1]


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return _points((left, top), (right, top), (right, bottom), (left, bottom))


def _plus() -> np.ndarray:
    w, a = 0.27, 0.95  # half the width, and the length of an arm
    return _points((-w, -a), (w, -a), (w, -w), (a, -w), (a, w), (w, w), (w, a), (-w, a), (-w, w), (-a, w), (-a, -w),
                   (-w, -w))  # fmt: skip


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return points @ np.array([[cosine, sine], [-sine, cosine]])


def _star() -> np.ndarray:
    points = np.empty((10, 2))
    points[0::2], points[1::2] = _regular(5, 1.0, -0.25), _regular(5, 0.42, -0.25 + 0.1)
    return points


def _heart() -> np.ndarray:
    angles = 2 * np.pi * np.arange(24) / 24
    x = 16 * np.sin(angles) ** 3
    y = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles))
    return np.stack([x, y - 2.5], axis=1) / 18.5


def _moon() -> np.ndarray:
    outer = _arc(0.95, 0.14, 0.86, 20)
    # The inner edge bulges to the same side and meets the outer edge at the two tips.
    tip, center = outer[0], 0.5
    angle = np.arctan2(tip[1], tip[0] - center) / (2 * np.pi)
    inner = _arc(float(np.hypot(tip[0] - center, tip[1])), 1 - angle, angle, 14, (center, 0.0))
    return np.concatenate([outer, inner[1:-1]])


# Outer edges run clockwise on the screen and holes counterclockwise, so that the inside of a hole counts 1 - 1 = 0.
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_regular(24, 0.88),),
    "ring": (_regular(24, 0.96), _regular(24, 0.52)[::-1]),
    "square": (_box(-0.7, -0.7, 0.7, 0.7),),
    "frame": (_box(-0.7, -0.7, 0.7, 0.7), _box(-0.36, -0.36, 0.36, 0.36)[::-1]),
    "triangle": (_regular(3, 1.0, -0.25),),
    "diamond": (_points((0, -1), (0.66, 0), (0, 1), (-0.66, 0)),),
    "plus": (_plus(),),
    "cross": (_turned(_plus(), np.pi / 4),),
    "star": (_star(),),
    "hexagon": (_regular(6, 0.95),),
    "moon": (_moon(),),
    "heart": (_heart(),),
    "arrow": (_points((-0.95, -0.2), (0.1, -0.2), (0.1, -0.72), (1, 0), (0.1, 0.72), (0.1, 0.2), (-0.95, 0.2)),),
    "bar": (_box(-0.95, -0.28, 0.95, 0.28),),
    "tee": (_points((-0.75, -0.66), (0.75, -0.66), (0.75, -0.2), (0.22, -0.2), (0.22, 0.95), (-0.22, 0.95),
                    (-0.22, -0.2), (-0.75, -0.2)),),
    "ell": (_points((-0.58, -0.8), (-0.14, -0.8), (-0.14, 0.36), (0.58, 0.36), (0.58, 0.8), (-0.58, 0.8)),),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- scenes
@dataclass(frozen=True)
class Copy:
    """One drawn glyph.

    `glyph` indexes ``GLYPHS``; `center` and `radius` are fractions of the picture's side; `rotation` is clockwise in
    radians; colors and opacity are in [0, 1].
    """

    glyph: int
    center: tuple[float, float]
    radius: float
    rotation: float
    colour: RGB
    opacity: float = 1.0


@dataclass(frozen=True)
class Attributes:
    """Properties that captions can name, for a scene of equal glyphs.

    `colour` and `ground` index ``COLOUR_NAMES`` and always differ. `large` is True for the larger of two radii.
    """

    glyph: int
    colour: int
    ground: int
    large: bool
    count: int


@dataclass(frozen=True)
class Scene:
    """Glyphs on a background color in [0, 1]; later glyphs cover earlier ones."""

    copies: tuple[Copy, ...]
    ground: RGB


@dataclass(frozen=True)
class Picture:
    """A drawn scene of n copies.

    Args:
        image: uint8 [H, W, 3].
        coverage: fraction of each pixel that a copy covers, float32 [n, H, W], including hidden parts.
        boxes: float32 [n, 4], left, top, right, bottom in pixels.
        polygons: outline of each copy in pixels, float64 [points, 2]; seams join holes to the outer edge.
    """

    image: np.ndarray
    coverage: np.ndarray
    boxes: np.ndarray
    polygons: tuple[np.ndarray, ...]


def repeated_scene(rng: np.random.Generator, glyph: int) -> tuple[Scene, Attributes]:
    """Draw a scene of two to four equal glyphs and its attributes. Source: docs/papers/mct.md [13] ("glyph scenes")."""
    colour, ground = (int(number) for number in rng.choice(len(COLOURS), 2, replace=False))
    large, count = bool(rng.integers(2)), COUNTS[int(rng.integers(len(COUNTS)))]
    radii = (LARGE_RADIUS if large else SMALL_RADIUS,) * count
    copies = _copies(rng, (glyph,) * count, radii, (colour,) * count)
    return Scene(copies, dark_ground(ground)), Attributes(glyph, colour, ground, large, count)


def mixed_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of one to three different glyphs in random colors and sizes. Few glyphs have a low contrast."""
    count = int(rng.integers(1, MOST_MIXED + 1))
    glyphs = [int(number) for number in rng.choice(len(GLYPHS), count, replace=False)]
    ground = int(rng.integers(len(COLOURS)))
    colours = [(ground + int(step)) % len(COLOURS) for step in rng.integers(1, len(COLOURS), count)]
    radii = [LARGE_RADIUS if large else SMALL_RADIUS for large in rng.integers(2, size=count)]
    opacities = np.where(rng.uniform(size=count) < FAINT, 0.3, 1.0)
    return Scene(_copies(rng, glyphs, radii, colours, opacities.tolist()), dark_ground(ground))


def dark_ground(colour: int) -> RGB:
    red, green, blue = COLOURS[COLOUR_NAMES[colour]]
    return (GROUND_SHADE * red, GROUND_SHADE * green, GROUND_SHADE * blue)


def place(rng: np.random.Generator, radii: Sequence[float]) -> np.ndarray:
    """Draw centers [n, 2] of circles that lie inside the unit square and do not overlap."""
    sizes = np.asarray(radii, dtype=np.float64)
    # Four large copies fill half of the square, so most single tries fail. Grow many arrangements in parallel and take
    # the first complete one.
    for _ in range(_ROUNDS):
        centers = np.empty((_ARRANGEMENTS, len(sizes), 2))
        alive = np.ones(_ARRANGEMENTS, dtype=bool)
        for number, radius in enumerate(sizes):
            tries = rng.uniform(radius, 1 - radius, size=(_ARRANGEMENTS, _TRIES, 2))
            gaps = tries[:, :, None] - centers[:, None, :number]
            free = ((gaps**2).sum(axis=-1) >= (radius + sizes[:number]) ** 2).all(axis=-1)
            centers[:, number] = tries[np.arange(_ARRANGEMENTS), free.argmax(axis=1)]
            alive &= free.any(axis=1)
        if alive.any():
            return centers[alive.argmax()]
    raise ValueError(f"no room for {len(sizes)} circles with radii {list(radii)} in a square of side 1")


def _copies(
    rng: np.random.Generator,
    glyphs: Sequence[int],
    radii: Sequence[float],
    colours: Sequence[int],
    opacities: Sequence[float] | None = None,
) -> tuple[Copy, ...]:
    centers, tilts = place(rng, radii), rng.uniform(-TILT, TILT, size=len(glyphs))
    return tuple(
        Copy(glyph, (float(x), float(y)), radius, float(tilt), COLOURS[COLOUR_NAMES[colour]], opacity)
        for glyph, (x, y), radius, tilt, colour, opacity in zip(
            glyphs, centers, radii, tilts, colours, opacities or (1.0,) * len(glyphs)
        )
    )


# ------------------------------------------------------------------------------------------------------------- drawing
def draw(scene: Scene, rng: np.random.Generator, size: int) -> Picture:
    """Draw a scene with smooth edges, a random linear gradient of brightness, and noise."""
    rings = [[_in_picture(ring, copy, size) for ring in OUTLINES[GLYPHS[copy.glyph]]] for copy in scene.copies]
    covered = coverage(rings, size)
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, GRADIENT)
    position = (np.arange(size) + 0.5) / size * 2 - 1
    slope = strength * (np.cos(direction) * position[None, :] + np.sin(direction) * position[:, None])
    pixels = np.broadcast_to(np.array(scene.ground), (size, size, 3))
    for copy, share in zip(scene.copies, covered):
        pixels = pixels + (copy.opacity * share)[..., None] * (np.array(copy.colour) - pixels)
    pixels = pixels + slope[..., None] + NOISE * rng.standard_normal((size, size, 3))
    polygons = tuple(_joined(own) for own in rings)
    boxes = np.array([[*own[0].min(axis=0), *own[0].max(axis=0)] for own in rings], dtype=np.float32).reshape(-1, 4)
    image = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return Picture(image, covered.astype(np.float32), boxes, polygons)


def coverage(shapes: Sequence[Sequence[np.ndarray]], size: int) -> np.ndarray:
    """Return the fraction of every pixel that each shape covers, float64 [n, size, size].

    Every edge adds or subtracts the pixels to the right of the edge, depending on the edge's direction. Summed over a
    closed outline, only the inside remains. Holes have the opposite direction, so they are subtracted. The area is
    exact along rows and sampled across rows. `shapes` are rings of float64 [points, 2] in pixels.
    """
    if not shapes:
        return np.zeros((0, size, size))
    begins = np.concatenate([ring for rings in shapes for ring in rings])
    ends = np.concatenate([np.roll(ring, -1, axis=0) for rings in shapes for ring in rings])
    owners = np.repeat(np.arange(len(shapes)), [sum(map(len, rings)) for rings in shapes])
    heights = (np.arange(size * _SCANLINES) + 0.5) / _SCANLINES
    low, high = np.minimum(begins[:, 1], ends[:, 1]), np.maximum(begins[:, 1], ends[:, 1])
    line, edge = np.nonzero((heights[:, None] >= low) & (heights[:, None] < high))
    rise = ends[edge, 1] - begins[edge, 1]
    along = (heights[line] - begins[edge, 1]) / rise
    crossing = np.clip(begins[edge, 0] + along * (ends[edge, 0] - begins[edge, 0]), 0, size)
    column = np.floor(crossing).astype(np.int64)
    part, weight = crossing - column, -np.sign(rise) / _SCANLINES
    # Changes of the coverage from column to column, with two spare columns for the right border.
    width = size + 2
    cell = (owners[edge] * size + line // _SCANLINES) * width + column
    steps = np.bincount(cell, weight * (1 - part), len(shapes) * size * width)
    steps += np.bincount(cell + 1, weight * part, len(shapes) * size * width)
    filled = np.cumsum(steps.reshape(len(shapes), size, width), axis=2)[..., :size]
    return np.clip(filled, 0, 1)


def _in_picture(ring: np.ndarray, copy: Copy, size: int) -> np.ndarray:
    return size * (np.array(copy.center) + copy.radius * _turned(ring, copy.rotation))


def _joined(rings: Sequence[np.ndarray]) -> np.ndarray:
    """Join a shape and its holes to one closed path, along seams that enclose nothing."""
    outer, *holes = rings
    path = [outer]
    for hole in holes:
        path += [outer[:1], hole, hole[:1]]
    return np.concatenate(path)
