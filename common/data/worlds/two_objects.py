"""A miniature for text-to-image generation: one drawn object on either side, captions that say what is where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data.annotations import ImageAnnotations
from common.data.worlds.base import World, Write
from common.data.worlds.layouts import Annotated, Instance, Vocabulary, coco_name, write_coco
from common.types import Fraction, NonNegativeInt, PositiveInt

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (0.9, 0.12, 0.12), "green": (0.12, 0.7, 0.2), "blue": (0.15, 0.25, 0.9), "yellow": (0.95, 0.85, 0.1)}
GROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5)}
SIDES = ("left", "right")
# What a picture shows: shape and colour of the left and of the right object, and the ground.
ATTRIBUTES = ("left_shape", "left_colour", "right_shape", "right_colour", "ground")
ATTRIBUTE_SIZES = (len(SHAPES), len(COLOURS), len(SHAPES), len(COLOURS), len(GROUNDS))
CATEGORIES = tuple(
    [(f"{colour} {shape}", shape) for shape in SHAPES for colour in COLOURS]
    + [(f"{g} ground", "ground") for g in GROUNDS]
)

# Lengths in pixels of a picture of 32.
_SIDE = 32
_RADII = (5.0, 7.0)
_UP_DOWN = 6.0
_SIDEWAYS = 1.0
_COLOUR_JITTER = 0.06
_TINT = 0.04
# Sizes that make the shapes cover about the same area: half a square's side, and the height of a triangle's center
# over its base, in radii.
_HALF_SQUARE = 0.88
_TRIANGLE_BASE = 0.62

# Numbers that keep the random draws of the splits apart, and whether another seed draws the split anew. What is
# measured on is the same for every seed, so that results differ by training alone.
_SPLITS = {"train": (1, True), "val": (2, False)}
_PICTURE, _WORDS = 0, 1  # independent random streams of one picture
_IDS_PER_SPLIT = 1_000_000
_MAX_CAPTIONS = 99
_CHUNK = 512  # pictures drawn at once
_LICENCE = "Apache License 2.0 (generated pictures)"


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures and what is in them.

    Args:
        images: uint8 [N, size, size, 3].
        attributes: int64 [N, 5], see ``ATTRIBUTES``.
        boxes: left, top, right, bottom of both objects in pixels, float64 [N, 2, 4].
        areas: pixels that each object covers, float64 [N, 2].
    """

    images: npt.NDArray[np.uint8]
    attributes: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]


class TwoObjectsWorld(World):
    """A stand-in for COCO 2014: pictures of two objects, one in the left and one in the right half, on a plain ground.

    An object is a circle, a square or a triangle, red, green, blue or yellow; the ground is white, black or gray: 432
    combinations. Every object is an instance of a category such as "red circle"; the ground is one, too, with the whole
    picture as its box. Captions name all of it, in random order: per object "a COLOUR SHAPE SIDE", "SIDE a COLOUR
    SHAPE" or "a COLOUR SHAPE at SIDE", then "on GROUND" or "on a GROUND". Files are PNG, so that no trace of a
    compression has to be learnt.

    Training pictures follow the seed, the others are one fixed draw.

    Args:
        seed: seed of the training split.
        train: pictures to train on.
        test: pictures of the validation split, to test on.
        size: side of a picture in pixels; larger ones show the same with more pixels.
        captions_per_image: captions of every picture, drawn one by one.
        relations: share of captions that say "a COLOUR SHAPE left of a COLOUR SHAPE" instead.
        root: folder for the worlds; None for `worlds` in the cache folder (`$ASSEMBLE_CACHE`, else the user's).

    Raises:
        ValueError: if an argument is out of its range.

    Source:
        docs/papers/xmc_gan.md [14.1].
    """

    kind = "two-objects"
    title = "world of two objects"
    names = ("coco_2014",)
    version = 1

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        train: NonNegativeInt = 6000,
        test: NonNegativeInt = 2000,
        size: PositiveInt = 32,
        captions_per_image: NonNegativeInt = 10,
        relations: Fraction = 0.0,
        root: str | None = None,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed: must not be below 0, got {seed}")
        for name, value in {"train": train, "test": test}.items():
            if not 0 < value <= _IDS_PER_SPLIT:
                raise ValueError(f"{name}: must be from 1 to {_IDS_PER_SPLIT:,}, got {value}")
        if size < 16:
            raise ValueError(f"size: objects need a picture of at least 16 pixels a side, got {size}")
        if not 0 < captions_per_image <= _MAX_CAPTIONS:
            raise ValueError(f"captions_per_image: must be from 1 to {_MAX_CAPTIONS}, got {captions_per_image}")
        if not 0 <= relations <= 1:
            raise ValueError(f"relations: a share is needed, got {relations}")
        self.counts = {"train": train, "val": test}
        self.seed = seed
        self.size = size
        self.captions_per_image = captions_per_image
        self.relations = relations
        super().__init__(
            {
                "seed": seed,
                "train": train,
                "test": test,
                "size": size,
                "captions_per_image": captions_per_image,
                "relations": relations,
            },
            root,
        )

    def _files(self, name: str) -> int:
        return sum(self.counts.values())

    def _fill(self, name: str, root: Path, write: Write) -> None:
        vocabulary = Vocabulary("Two objects side by side", CATEGORIES, (_LICENCE,))
        for split, count in self.counts.items():
            images: list[Annotated] = []
            for first in range(0, count, _CHUNK):
                rows = range(first, min(first + _CHUNK, count))
                pictures = self.draw(split, rows)
                for row, image in zip(rows, pictures.images):
                    number = _SPLITS[split][0] * _IDS_PER_SPLIT + row
                    path = root / f"{split}2014" / f"COCO_{split}2014_{Path(coco_name(number)).stem}.png"
                    write(path, partial(Image.fromarray(image).save, path, "PNG"))
                    own = row - first
                    images.append(
                        Annotated(
                            number,
                            path.name,
                            self.size,
                            self.size,
                            self.captions(split, row, pictures.attributes[own].tolist()),
                            self._instances(pictures, own),
                        )
                    )
            write_coco(root, f"{split}2014", images, vocabulary)

    def draw(self, split: str, rows: Sequence[int]) -> Pictures:
        """Draw some pictures of a split; each depends on the seed and its own number alone.

        Args:
            split: `train` or `val`.
            rows: numbers of the pictures, from 0.
        """
        draws = np.stack([self._rng(split, row, _PICTURE).random(20) for row in rows])
        attributes = np.floor(draws[:, :5] * ATTRIBUTE_SIZES).astype(np.int64)
        spread = 2 * draws[:, 5:] - 1  # in [-1, 1)
        scale = self.size / _SIDE
        colours, grounds = np.array(list(COLOURS.values())), np.array(list(GROUNDS.values()))
        ground = np.clip(grounds[attributes[:, 4]] + _TINT * spread[:, :3], 0, 1)
        colour = np.clip(colours[attributes[:, [1, 3]]] + _COLOUR_JITTER * spread[:, 3:9].reshape(-1, 2, 3), 0, 1)
        radius = scale * (_RADII[0] + (_RADII[1] - _RADII[0]) * (spread[:, 9:11] + 1) / 2)
        center_x = scale * (np.array([0.25, 0.75]) * _SIDE + _SIDEWAYS * spread[:, 11:13])
        center_y = scale * (0.5 * _SIDE + _UP_DOWN * spread[:, 13:15])
        pixel = np.arange(self.size) + 0.5
        x = pixel[None, None, None, :] - center_x[:, :, None, None]
        y = pixel[None, None, :, None] - center_y[:, :, None, None]
        distance = _distances(attributes[:, [0, 2]], x, y, radius[:, :, None, None])
        coverage = np.clip(0.5 - distance, 0, 1)
        image = np.broadcast_to(ground[:, None, None, :], (len(draws), self.size, self.size, 3))
        for side in range(2):
            opacity = coverage[:, side, :, :, None]
            image = image * (1 - opacity) + colour[:, side, None, None, :] * opacity
        extents = np.array([_extent(shape) for shape in SHAPES])[attributes[:, [0, 2]]] * radius[..., None]
        corners = np.stack([center_x, center_y, center_x, center_y], axis=-1) + extents
        return Pictures(
            np.rint(255 * image).astype(np.uint8),
            attributes,
            np.clip(corners, 0, self.size),
            coverage.sum(axis=(2, 3)),
        )

    def captions(self, split: str, row: int, attributes: Sequence[int]) -> tuple[str, ...]:
        """The captions of a picture; equal ones may occur.

        Args:
            split, row: the picture.
            attributes: what it shows, see ``ATTRIBUTES``.
        """
        draws = self._rng(split, row, _WORDS).random((self.captions_per_image, 5)).tolist()
        return tuple(_caption(own, attributes, self.relations) for own in draws)

    def _rng(self, split: str, row: int, stream: int) -> np.random.Generator:
        number, seeded = _SPLITS[split]
        return np.random.default_rng([1 + self.seed if seeded else 0, number, row, stream])

    def _instances(self, pictures: Pictures, row: int) -> tuple[Instance, ...]:
        side = float(self.size)
        left_shape, left_colour, right_shape, right_colour, ground = pictures.attributes[row].tolist()
        categories = (left_shape * len(COLOURS) + left_colour, right_shape * len(COLOURS) + right_colour)
        objects = [
            Instance(category, _corners(box), float(area), _outline(shape, *_corners(box)))
            for category, shape, box, area in zip(
                categories, (left_shape, right_shape), pictures.boxes[row], pictures.areas[row]
            )
        ]
        whole = (0.0, 0.0, side, side)
        number = len(SHAPES) * len(COLOURS) + ground
        return (*objects, Instance(number, whole, side * side, _outline(SHAPES.index("square"), *whole)))


def attributes_of(annotations: ImageAnnotations) -> npt.NDArray[np.int64]:
    """What pictures of this world show, recovered from the instances that their annotation file lists.

    Args:
        annotations: of some pictures, with boxes.

    Returns:
        int64 [N, 5], see ``ATTRIBUTES``.

    Raises:
        ValueError: the annotations are not of this world, or a picture lacks an object.
    """
    names = tuple(name for name, _ in CATEGORIES)
    if annotations.tag_names != names:
        raise ValueError(
            "only pictures of the world of two objects have attributes; the categories of these are "
            f"{', '.join(annotations.tag_names[:4]) or 'none'}"
        )
    boxes = annotations.boxes()
    if any(len(own["labels"]) != 3 for own in boxes):
        wrong = next(row for row, own in enumerate(boxes) if len(own["labels"]) != 3)
        raise ValueError(
            f"image {annotations.image_ids[wrong]} has {len(boxes[wrong]['labels'])} instances where two objects and a "
            "ground are expected; render the world anew"
        )
    if not boxes:
        return np.zeros((0, len(ATTRIBUTES)), dtype=np.int64)
    labels = np.stack([own["labels"] for own in boxes])
    corners = np.stack([own["boxes"] for own in boxes])
    objects = len(SHAPES) * len(COLOURS)
    # The ground comes last, the objects from left to right.
    middle = np.where(labels < objects, corners[:, :, 0] + corners[:, :, 2], np.inf)
    ordered = np.take_along_axis(labels, np.argsort(middle, axis=1, kind="stable"), axis=1)
    if (ordered[:, :2] >= objects).any() or (ordered[:, 2] < objects).any():
        raise ValueError("a picture has another number of objects than two; render the world anew")
    shapes, colours = np.divmod(ordered[:, :2], len(COLOURS))
    return np.stack([shapes[:, 0], colours[:, 0], shapes[:, 1], colours[:, 1], ordered[:, 2] - objects], axis=1)


def _caption(draws: Sequence[float], attributes: Sequence[int], relations: float) -> str:
    colours, grounds = tuple(COLOURS), tuple(GROUNDS)
    named = [f"{colours[attributes[1 + 2 * side]]} {SHAPES[attributes[2 * side]]}" for side in range(2)]
    order = (0, 1) if draws[0] < 0.5 else (1, 0)
    ground = f"on {'a ' if draws[1] < 0.5 else ''}{grounds[attributes[4]]}"
    if draws[4] < relations:
        return f"a {named[order[0]]} {SIDES[order[0]]} of a {named[order[1]]} {ground}"
    said = []
    for side, draw in zip(order, draws[2:4]):
        forms = (
            f"a {named[side]} {SIDES[side]}",
            f"{SIDES[side]} a {named[side]}",
            f"a {named[side]} at {SIDES[side]}",
        )
        said.append(forms[int(draw * len(forms))])
    return f"{said[0]} and {said[1]} {ground}"


def _distances(
    shapes: npt.NDArray[np.int64],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    radius: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Signed distances of pixels from the edges of the objects, below 0 inside, [N, 2, size, size]."""
    circle = np.hypot(x, y) - radius
    square = np.maximum(np.abs(x), np.abs(y)) - _HALF_SQUARE * radius
    # A point on top and a base below: two slanted edges that meet in the point, whose normals lean half as far out.
    steep = np.hypot(1.0, 1.0 + _TRIANGLE_BASE)
    slanted = (np.abs(x) * (1 + _TRIANGLE_BASE) - (y + radius)) / steep
    triangle = np.maximum(slanted, y - _TRIANGLE_BASE * radius)
    return np.choose(shapes[:, :, None, None], [circle, square, triangle])


def _extent(shape: str) -> tuple[float, float, float, float]:
    """Box of a shape around its center, in radii."""
    if shape == "square":
        return (-_HALF_SQUARE, -_HALF_SQUARE, _HALF_SQUARE, _HALF_SQUARE)
    return (-1.0, -1.0, 1.0, 1.0 if shape == "circle" else _TRIANGLE_BASE)


def _corners(box: npt.NDArray[np.float64]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box.tolist()
    return left, top, right, bottom


def _outline(shape: int, left: float, top: float, right: float, bottom: float) -> npt.NDArray[np.float64]:
    if SHAPES[shape] == "square":
        return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    if SHAPES[shape] == "triangle":
        return np.array([((left + right) / 2, top), (right, bottom), (left, bottom)])
    turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    center, half = np.array([left + right, top + bottom]) / 2, np.array([right - left, bottom - top]) / 2
    return center + half * np.stack([np.cos(turn), np.sin(turn)], axis=1)
