"""A miniature for image-text pre-training: captioned scenes of drawn glyphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from common.data.datasets.coco import Annotated, Instance, Vocabulary, coco_name, write_coco
from common.data.datasets.coco_karpathy import karpathy_folder, karpathy_name, write_karpathy
from common.data.datasets.imagenet import imagenet_path, write_class_names
from common.data.datasets.voc import write_voc
from common.data.worlds.base import World, Write, arguments_of, write_jpeg
from common.data.worlds.glyphs import (
    COLOUR_NAMES,
    COUNTS,
    GLYPHS,
    Attributes,
    Picture,
    Scene,
    draw,
    mixed_scene,
    repeated_scene,
)
from common.types import Fraction, NonNegativeInt, PictureSide, PositiveInt

Probe = Literal["glyph", "colour", "count", "coloured_glyph"]

CAPTIONS_PER_IMAGE = 5
COUNT_WORDS = ("two", "three", "four")
# Names of each glyph; a caption uses one of them.
NOUNS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "dot"),
    "ring": ("ring", "hoop", "annulus"),
    "square": ("square", "block"),
    "frame": ("frame", "window"),
    "triangle": ("triangle", "wedge"),
    "diamond": ("diamond", "rhombus", "lozenge"),
    "plus": ("plus",),
    "cross": ("cross", "saltire"),
    "star": ("star", "pentagram"),
    "hexagon": ("hexagon",),
    "moon": ("moon", "crescent"),
    "heart": ("heart",),
    "arrow": ("arrow", "pointer"),
    "bar": ("bar", "rod", "stripe"),
    "tee": ("tee", "hammer"),
    "ell": ("ell", "corner", "elbow"),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "round thing": ("circle", "ring", "moon", "heart"),
    "boxy thing": ("square", "frame", "hexagon"),
    "pointed thing": ("triangle", "diamond", "star", "arrow"),
    "crossed thing": ("plus", "cross"),
    "straight thing": ("bar", "tee", "ell"),
}
GROUP_OF = {glyph: group for group, glyphs in GROUPS.items() for glyph in glyphs}

# Random stream of each split, and whether it depends on the seed. Test data do not, so results of seeds differ by
# training alone (docs/papers/mct.md [13]).
_SPLITS = {
    "coco/train": (1, True),
    "coco/val": (2, False),
    "karpathy/train": (3, True),
    "karpathy/val": (4, False),
    "karpathy/test": (5, False),
    "probe/train": (6, True),
    "probe/val": (7, False),
    "voc/trainval": (8, True),
    "voc/test": (9, False),
}
_PICTURE, _WORDS = 0, 1  # independent random streams of one scene
_IDS_PER_SPLIT = 1_000_000
_LICENCES = ("Apache License 2.0 (generated pictures)",)


@dataclass(frozen=True)
class CaptionWords:
    """Probability of each word in "a [two] [small] [red] NOUN [on blue]".

    With probability `glyph` the noun names the glyph. Otherwise it names the coarse group with probability `group`, or
    is "thing".
    """

    count: Fraction = 0.2
    size: Fraction = 0.2
    colour: Fraction = 0.25
    ground: Fraction = 0.15
    glyph: Fraction = 0.7
    group: Fraction = 1.0


def caption(rng: np.random.Generator, attributes: Attributes, words: CaptionWords) -> str:
    """Draw a caption of a scene. Nouns stay singular. Source: docs/papers/mct.md [13] ("glyph scenes")."""
    count, size, colour, ground, glyph, group = rng.uniform(size=6)
    name = GLYPHS[attributes.glyph]
    spoken = ["a"]
    if count < words.count:
        spoken.append(COUNT_WORDS[COUNTS.index(attributes.count)])
    if size < words.size:
        spoken.append("large" if attributes.large else "small")
    if colour < words.colour:
        spoken.append(COLOUR_NAMES[attributes.colour])
    if glyph < words.glyph:
        spoken.append(NOUNS[name][int(rng.integers(len(NOUNS[name])))])
    else:
        spoken.append(GROUP_OF[name] if group < words.group else "thing")
    if ground < words.ground:
        spoken.append(f"on {COLOUR_NAMES[attributes.ground]}")
    return " ".join(spoken)


class ShapesWorld(World):
    """Replaces COCO (both splits), Pascal VOC 2007 and ImageNet: scenes of one of 16 glyphs on a colored ground.

    A scene has two to four copies of one glyph. Tags always name the glyph. Captions mostly name the glyph, and seldom
    name its color or number. VOC scenes have one to three different glyphs. Splits are independent. Only training
    splits depend on the seed.

    Args:
        voc_train, voc_test: numbers of pictures of VOC. In `trainval`, even rows are `train` and odd rows are `val`.
        size, voc_size: side of a picture in pixels; None makes `voc_size` equal to `size`.
        probe: property that defines the classes of ImageNet. Doesn't change the pictures.
        words: probability of each kind of word in a caption; by default `CaptionWords()`.

    Source: docs/papers/mct.md [13].
    """

    kind = "shapes"
    title = "shapes world"
    names = ("coco", "coco_karpathy", "voc", "imagenet")
    version = 1

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        train: PositiveInt = 3000,
        val: PositiveInt = 500,
        karpathy_train: PositiveInt = 1500,
        karpathy_val: PositiveInt = 250,
        karpathy_test: PositiveInt = 1000,
        probe_train: PositiveInt = 2000,
        probe_test: PositiveInt = 2000,
        voc_train: PositiveInt = 600,
        voc_test: PositiveInt = 600,
        size: PictureSide = 32,
        voc_size: PictureSide | None = None,
        probe: Probe = "glyph",
        words: CaptionWords | None = None,
        root: str | None = None,
    ) -> None:
        parameters = arguments_of(locals())
        self.words = words or CaptionWords()
        self.seed = seed
        self.size = size
        self.voc_size = size if voc_size is None else voc_size
        self.probe = probe
        # `probe` is part of a folder's name instead, because it changes no other files.
        del parameters["probe"]
        super().__init__({**parameters, "voc_size": self.voc_size, "words": asdict(self.words)}, root)

    def root_of(self, name: str) -> Path:
        root = super().root_of(name)
        return root.with_name(f"imagenet-{self.probe}") if name == "imagenet" else root

    # -- scenes --------------------------------------------------------------------------------------------------------

    def _rng(self, split: str, index: int, stream: int) -> np.random.Generator:
        number, seeded = _SPLITS[split]
        return np.random.default_rng([1 + self.seed if seeded else 0, number, index, stream])

    def _drawn(self, split: str, count: int) -> Iterator[tuple[Attributes, Scene, Picture]]:
        """Yield the pictures of a split. Pictures cycle through the glyphs, so any 16 in a row are balanced."""
        for index in range(count):
            rng = self._rng(split, index, _PICTURE)
            scene, attributes = repeated_scene(rng, index % len(GLYPHS))
            yield attributes, scene, draw(scene, rng, self.size)

    def _captioned(
        self, split: str, count: int, folder: Path, name_of: Callable[[int], str], write: Write
    ) -> list[Annotated]:
        images = []
        for index, (attributes, scene, picture) in enumerate(self._drawn(split, count)):
            number = _SPLITS[split][0] * _IDS_PER_SPLIT + index
            path = folder / name_of(number)
            write(path, partial(write_jpeg, path, picture.image))
            rng = self._rng(split, index, _WORDS)
            captions = tuple(caption(rng, attributes, self.words) for _ in range(CAPTIONS_PER_IMAGE))
            images.append(Annotated(number, path.name, self.size, self.size, captions, _instances(scene, picture)))
        return images

    # -- layouts -------------------------------------------------------------------------------------------------------

    def _fill_coco(self, root: Path, write: Write) -> None:
        categories = tuple((glyph, GROUP_OF[glyph]) for glyph in GLYPHS)
        vocabulary = Vocabulary("Shapes world: scenes of glyphs", categories, _LICENCES)
        for part in ("train", "val"):
            split = f"{part}2017"
            images = self._captioned(f"coco/{part}", self.parameters[part], root / split, coco_name, write)
            write_coco(root, split, images, vocabulary)

    def _fill_coco_karpathy(self, root: Path, write: Write) -> None:
        parts: dict[str, list[Annotated]] = {}
        for part in ("train", "val", "test"):
            folder, name_of = root / karpathy_folder(part), partial(karpathy_name, split=part)
            count = self.parameters[f"karpathy_{part}"]
            parts[part] = self._captioned(f"karpathy/{part}", count, folder, name_of, write)
        write_karpathy(root, parts)

    def _fill_voc(self, root: Path, write: Write) -> None:
        folder = root / "VOCdevkit" / "VOC2007"
        images: list[Annotated] = []
        parts: dict[str, list[int]] = {"train": [], "val": [], "trainval": [], "test": []}
        for split, count in (("trainval", self.parameters["voc_train"]), ("test", self.parameters["voc_test"])):
            for index in range(count):
                rng = self._rng(f"voc/{split}", index, _PICTURE)
                scene = mixed_scene(rng)
                picture = draw(scene, rng, self.voc_size)
                number = len(images) + 1
                path = folder / "JPEGImages" / f"{number:06d}.jpg"
                write(path, partial(write_jpeg, path, picture.image))
                side, objects = self.voc_size, _instances(scene, picture)
                parts[split].append(len(images))
                if split == "trainval":
                    parts["val" if index % 2 else "train"].append(len(images))
                images.append(Annotated(number, path.name, side, side, instances=objects))
        write_voc(folder, images, GLYPHS, parts)

    def _fill_imagenet(self, root: Path, write: Write) -> None:
        both = tuple(f"{colour} {glyph}" for glyph in GLYPHS for colour in COLOUR_NAMES)
        classes = {"glyph": GLYPHS, "colour": COLOUR_NAMES, "count": COUNT_WORDS, "coloured_glyph": both}
        for split, count in (("train", self.parameters["probe_train"]), ("val", self.parameters["probe_test"])):
            for number, (shown, _, picture) in enumerate(self._drawn(f"probe/{split}", count), 1):
                labels = {
                    "glyph": shown.glyph,
                    "colour": shown.colour,
                    "count": COUNTS.index(shown.count),
                    "coloured_glyph": shown.glyph * len(COLOUR_NAMES) + shown.colour,
                }
                path = imagenet_path(root, split, labels[self.probe], number)
                write(path, partial(write_jpeg, path, picture.image))
        write_class_names(root, classes[self.probe])


def _instances(scene: Scene, picture: Picture) -> tuple[Instance, ...]:
    areas = picture.coverage.sum(axis=(1, 2)).tolist()
    return tuple(
        Instance(copy.glyph, tuple(box), area, polygon, copy.opacity < 1)
        for copy, box, area, polygon in zip(scene.copies, picture.boxes.tolist(), areas, picture.polygons)
    )
