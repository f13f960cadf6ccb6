"""Base of the worlds for text-to-image generation: a thing in each half, and captions that say what is where."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data.annotations import ImageAnnotations
from common.data.datasets.coco import Annotated, Instance, Vocabulary, coco_name, write_coco
from common.data.worlds.base import World, Write, arguments_of
from common.types import Fraction, NonNegativeInt, PictureSide, PositiveInt

GROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5)}
SIDES = ("left", "right")

# Lengths are in pixels of a picture with this side.
SIDE = 32
_UP_DOWN = 6.0
_SIDEWAYS = 1.0
_TINT = 0.04

# Random stream of each split, and whether it depends on the seed. Test data don't: only training makes seeds differ.
_SPLITS = {"train": (1, True), "val": (2, False)}
_PICTURE, _WORDS = 0, 1  # independent random streams of one picture
_IDS_PER_SPLIT = 1_000_000
_CHUNK = 512  # pictures drawn together

Floats = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Things:
    """The left and right thing of each picture, before they are drawn on the ground.

    Args:
        colours: in [0, 1], [N, 2, size, size, 3] or a shape that broadcasts to it.
        coverage: fraction of each pixel that a thing covers, [N, 2, size, size].
        boxes: left, top, right, bottom in pixels, [N, 2, 4].
    """

    colours: Floats
    coverage: Floats
    boxes: Floats
    licences: Sequence[int]


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures (uint8 [N, size, size, 3]) and their annotations.

    Args:
        attributes: int64 [N, A], see ``TwoSidesWorld``.
        boxes: left, top, right, bottom of both things in pixels, float64 [N, 2, 4].
        areas: pixels that each thing covers, float64 [N, 2].
    """

    images: npt.NDArray[np.uint8]
    attributes: npt.NDArray[np.int64]
    boxes: Floats
    areas: Floats
    licences: Sequence[int]


class TwoSidesWorld(World):
    """Replaces COCO 2014: pictures of two things, one in the left and one in the right half, on a plain ground.

    Both things and the ground are instances of named categories. The ground is white, black or gray, and its box is the
    whole picture. Captions name both things and the ground: "a THING SIDE", "SIDE a THING" or "a THING at SIDE" for
    each thing, in random order, then "on GROUND" or "on a GROUND". A fraction `relations` of the captions says "a THING
    left of a THING" instead. Files are PNG to avoid compression artifacts. The attributes of a picture are the left
    thing's attributes, the right thing's attributes, and the ground. Only training pictures depend on the seed.
    """

    names = ("coco_2014",)
    description: ClassVar[str]
    licences: ClassVar[tuple[str, ...]]
    # Name and supercategory of each thing.
    things: ClassVar[tuple[tuple[str, str], ...]]
    # Number of values of each attribute of a thing. In a thing's number, the last attribute varies fastest.
    thing_sizes: ClassVar[tuple[int, ...]]
    # Number of random draws per picture besides its attributes and the tint of its ground.
    _numbers: ClassVar[int]

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        train: PositiveInt = 6000,
        test: PositiveInt = 2000,
        size: PictureSide = 32,
        captions_per_image: PositiveInt = 10,
        relations: Fraction = 0.0,
        root: str | None = None,
    ) -> None:
        parameters = arguments_of(locals())
        self.counts = {"train": train, "val": test}
        self.seed = seed
        self.size = size
        self.captions_per_image = captions_per_image
        self.relations = relations
        super().__init__(parameters, root)

    def _fill_coco_2014(self, root: Path, write: Write) -> None:
        categories = (*self.things, *((f"{ground} ground", "ground") for ground in GROUNDS))
        vocabulary = Vocabulary(self.description, categories, self.licences)
        for split, count in self.counts.items():
            images: list[Annotated] = []
            for first in range(0, count, _CHUNK):
                rows = range(first, min(first + _CHUNK, count))
                pictures = self.draw(split, rows)
                for row, image in zip(rows, pictures.images):
                    number = _SPLITS[split][0] * _IDS_PER_SPLIT + row
                    path = root / f"{split}2014" / f"COCO_{split}2014_{Path(coco_name(number)).stem}.png"
                    write(path, partial(Image.fromarray(image).save, path, "PNG"))
                    place = row - first
                    images.append(
                        Annotated(
                            number,
                            path.name,
                            self.size,
                            self.size,
                            self.captions(split, row, pictures.attributes[place].tolist()),
                            self._instances(pictures, place),
                            license=pictures.licences[place],
                        )
                    )
            write_coco(root, f"{split}2014", images, vocabulary)

    @classmethod
    def attribute_sizes(cls) -> tuple[int, ...]:
        return (*cls.thing_sizes, *cls.thing_sizes, len(GROUNDS))

    @classmethod
    def thing_of(cls, attributes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the numbers of the left and the right thing, int64 [N, 2], from attributes [N, A]."""
        both = np.asarray(attributes)[:, :-1].reshape(-1, 2, len(cls.thing_sizes))
        return np.ravel_multi_index(tuple(np.moveaxis(both, -1, 0)), cls.thing_sizes)

    def draw(self, split: str, rows: Sequence[int]) -> Pictures:
        """Draw pictures of `train` or `val`. A picture depends only on the seed and its row number (from 0)."""
        sizes = self.attribute_sizes()
        count = len(sizes) + 3 + self._numbers
        draws = np.stack([self._rng(split, row, _PICTURE).random(count) for row in rows])
        attributes = np.floor(draws[:, : len(sizes)] * sizes).astype(np.int64)
        spread = 2 * draws[:, len(sizes) :] - 1  # uniform in [-1, 1)
        grounds = np.array(list(GROUNDS.values()))
        ground = np.clip(grounds[attributes[:, -1]] + _TINT * spread[:, :3], 0, 1)
        things = self._things(attributes, spread[:, 3:])
        image = np.broadcast_to(ground[:, None, None, :], (len(draws), self.size, self.size, 3))
        for side in range(2):
            opacity = things.coverage[:, side, :, :, None]
            image = image * (1 - opacity) + things.colours[:, side] * opacity
        return Pictures(
            np.rint(255 * image).astype(np.uint8),
            attributes,
            np.clip(things.boxes, 0, self.size),
            things.coverage.sum(axis=(2, 3)),
            things.licences,
        )

    @abstractmethod
    def _things(self, attributes: npt.NDArray[np.int64], spread: Floats) -> Things:
        """Return the things of pictures with `attributes` [N, A]. `spread` [N, `_numbers`] is random in [-1, 1)."""

    def _centers(self, spread: Floats) -> tuple[Floats, Floats]:
        """Return x and y in pixels, [N, 2] each, from random numbers [N, 4]."""
        scale = self.size / SIDE
        return (
            scale * (np.array([0.25, 0.75]) * SIDE + _SIDEWAYS * spread[:, :2]),
            scale * (0.5 * SIDE + _UP_DOWN * spread[:, 2:]),
        )

    def captions(self, split: str, row: int, attributes: Sequence[int]) -> tuple[str, ...]:
        """Return the captions of a picture. Two captions may be equal."""
        draws = self._rng(split, row, _WORDS).random((self.captions_per_image, 5)).tolist()
        named = [self.things[thing][0] for thing in self.thing_of([attributes])[0]]
        ground = tuple(GROUNDS)[attributes[-1]]
        return tuple(_caption(draw, named, ground, self.relations) for draw in draws)

    def _rng(self, split: str, row: int, stream: int) -> np.random.Generator:
        number, seeded = _SPLITS[split]
        return np.random.default_rng([1 + self.seed if seeded else 0, number, row, stream])

    def _instances(self, pictures: Pictures, row: int) -> tuple[Instance, ...]:
        objects = []
        for thing, corners, area in zip(
            self.thing_of(pictures.attributes[row : row + 1])[0].tolist(), pictures.boxes[row], pictures.areas[row]
        ):
            box: Box = tuple(corners.tolist())
            objects.append(Instance(thing, box, float(area), self._outline(thing, box)))
        side = float(self.size)
        whole = (0.0, 0.0, side, side)
        number = len(self.things) + int(pictures.attributes[row, -1])
        return (*objects, Instance(number, whole, side * side, rectangle(whole)))

    def _outline(self, thing: int, box: Box) -> Floats:
        return rectangle(box)

    @classmethod
    def attributes_of(cls, annotations: ImageAnnotations) -> npt.NDArray[np.int64]:
        """Recover the attributes of pictures, int64 [N, A], from the instances in their annotation file."""
        boxes = annotations.boxes()
        labels = np.stack([entry["labels"] for entry in boxes])
        corners = np.stack([entry["boxes"] for entry in boxes])
        count = len(cls.things)
        # Sort the things from left to right, with the ground last.
        middle = np.where(labels < count, corners[:, :, 0] + corners[:, :, 2], np.inf)
        ordered = np.take_along_axis(labels, np.argsort(middle), axis=1)
        both = np.stack(np.unravel_index(ordered[:, :2], cls.thing_sizes), axis=-1).reshape(len(boxes), -1)
        return np.concatenate([both, ordered[:, 2:] - count], axis=1)


def rectangle(box: Box) -> Floats:
    """Return the corners of a box [4, 2]."""
    left, top, right, bottom = box
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _caption(draws: Sequence[float], named: Sequence[str], ground_name: str, relations: float) -> str:
    order = (0, 1) if draws[0] < 0.5 else (1, 0)
    ground = f"on {'a ' if draws[1] < 0.5 else ''}{ground_name}"
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
