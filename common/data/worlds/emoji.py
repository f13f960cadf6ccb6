"""A miniature of real drawings: 818 things, each drawn by four designers, with names and keywords in six languages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from common.data.datasets.coco import Annotated, Instance, Vocabulary, coco_name, write_coco
from common.data.datasets.coco_karpathy import karpathy_folder, karpathy_name, write_karpathy
from common.data.datasets.imagenet import imagenet_path, write_class_names
from common.data.worlds.base import World, Write, arguments_of, write_jpeg
from common.types import NonNegativeInt, PictureSide, PositiveInt

# Attribution that figures with drawings must show (see the pack's ATTRIBUTION.md).
CREDIT = (
    "Emoji artwork: Noto Emoji (Google, Apache-2.0), Twemoji (CC-BY-4.0), OpenMoji (CC-BY-SA-4.0), "
    "Fluent Emoji (Microsoft, MIT)"
)
# Designers and their licenses.
STYLES = {
    "noto": "Apache License 2.0 (Noto Emoji, Google)",
    "openmoji": "CC BY-SA 4.0 (OpenMoji)",
    "fluent_flat": "MIT License (Fluent Emoji, Microsoft)",
    "twemoji": "CC BY 4.0 (Twemoji, Twitter and contributors)",
}
# Karpathy's val split shows the pack's val concepts, drawn by the last training designer.
TRAIN_STYLES = ("noto", "openmoji", "fluent_flat")
TEST_STYLE = "twemoji"
DESIGNERS: dict[str, object] = {"train_styles": [*TRAIN_STYLES], "test_style": TEST_STYLE}
Language = Literal["en", "de", "fr", "cs", "ja", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
CORE_GROUPS = ("Animals & Nature", "Food & Drink", "Objects", "Activities", "Travel & Places")
# Things that look alike: clock faces, arrows, buttons.
LEFT_OUT_SUBGROUPS = ("time", "arrow", "av-symbol", "hotel")
CELL, COLUMNS = 64, 40
TAG_FROM = 3  # a keyword becomes a tag if this many concepts share it
CLASS_FROM = 10  # a subgroup becomes a class if it has this many concepts
CAPTIONS_PER_IMAGE = 5

STYLE_NUMBERS = {style: number for number, style in enumerate(STYLES, 1)}
_GROUND, _WORDS = 0, 1  # independent random streams of one picture
LIGHT = (0.75, 1.0)
_OPAQUE = 0.1  # the box of a drawing encloses the pixels with at least this opacity


# ------------------------------------------------------------------------------------------------------------ the pack
@dataclass(frozen=True)
class Concept:
    """A thing with drawings and names. `styles` are the designers who drew the thing.

    `index` is the concept's row in the pack of drawings and cell in each sheet. `code_points` are hexadecimal, joined
    by "-". Tasks that test on new concepts use `split` (`train`, `val` or `test`).
    """

    index: int
    code_points: str
    group: str
    subgroup: str
    split: str
    styles: tuple[str, ...]
    name: Mapping[str, str]
    keywords: Mapping[str, tuple[str, ...]]

    @property
    def core(self) -> bool:
        """Whether the concept has a name, looks different from other concepts, and was drawn by all four designers."""
        kept = self.group in CORE_GROUPS and self.subgroup not in LEFT_OUT_SUBGROUPS
        return kept and set(self.styles) == set(STYLES)


def pack() -> Traversable:
    return files("common.data.worlds") / "emoji_mini"


def read_concepts() -> tuple[Concept, ...]:
    """Read all 1,580 concepts of the pack, ordered by index. The worlds only use concepts with ``core``."""
    rows = map(json.loads, (pack() / "emoji.jsonl").read_text(encoding="utf-8").splitlines())
    return tuple(
        Concept(
            row["i"], row["cp"], row["group"], row["subgroup"], row["split"], tuple(row["have"]), row["name"],
            {language: tuple(words) for language, words in row["keywords"].items()},
        )
        for row in rows
    )  # fmt: skip


def read_drawings(style: str, indices: Sequence[int]) -> np.ndarray:
    """Read a designer's drawings on a transparent ground, uint8 [n, 64, 64, 4]."""
    with (pack() / f"{style}.webp").open("rb") as stream, Image.open(stream) as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    cells = pixels.reshape(-1, CELL, COLUMNS, CELL, 4).swapaxes(1, 2).reshape(-1, CELL, CELL, 4)
    return cells[np.asarray(indices, dtype=np.int64)]


def picture_number(style: str, concept: Concept) -> int:
    return 10_000 * STYLE_NUMBERS[style] + concept.index


def captions_of(rng: np.random.Generator, concept: Concept, language: str = "en") -> tuple[str, ...]:
    """Return five captions of a concept. Captions are shorter if the concept has too few keywords.

    The captions hold, separated by commas: the name; the name and a keyword; the name and two keywords; two keywords;
    three keywords.
    """
    name, comma = concept.name[language], "、" if language in ("ja", "zh") else ", "
    others = [word for word in concept.keywords[language] if word.casefold() != name.casefold()] or [name]

    def some(count: int) -> list[str]:
        return [others[int(position)] for position in rng.permutation(len(others))[:count]]

    said = ([name], [name, *some(1)], [name, *some(2)], some(2), some(3))
    # If the only keyword is the name, say it once.
    return tuple(comma.join(dict.fromkeys(words)) for words in said)


def compose(drawing: np.ndarray, ground: np.ndarray, size: int) -> np.ndarray:
    """Put a drawing, uint8 [64, 64, 4], on a ground of one color [3] in [0, 1]. Return uint8 [size, size, 3]."""
    opacity = drawing[..., 3:] / 255
    pixels = np.round(drawing[..., :3] * opacity + 255 * ground * (1 - opacity)).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))


# ----------------------------------------------------------------------------------------------------------- the world
class EmojiWorld(World):
    """Replaces COCO (both splits) and ImageNet with real drawings: each picture shows one thing by one designer.

    COCO is split by designer: training has all concepts, but no drawing by the test designer. `group_id` is the
    concept, so two drawings of a concept can be two views. Categories are the keywords that at least three concepts
    share. ImageNet is split by concept: classes are subgroups, and no training picture of ImageNet shows a test
    concept. (COCO's training pictures do show test concepts, with keywords that mostly imply the class.) The seed only
    affects the grounds and captions of training pictures.

    Args:
        language: of captions and tags; one of en, de, fr, cs, ja, zh.
        concepts: number of concepts in COCO, evenly spaced among the 818; None for all.
        classes: number of classes in ImageNet: the largest of the 30 subgroups.
    """

    kind = "emoji"
    title = "emoji world"
    names = ("coco", "coco_karpathy", "imagenet")
    version = 1
    credit = CREDIT

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        language: Language = "en",
        size: PictureSide = 32,
        concepts: PositiveInt | None = None,
        classes: PositiveInt = 30,
        root: str | None = None,
    ) -> None:
        parameters = arguments_of(locals())
        core = tuple(concept for concept in read_concepts() if concept.core)
        sizes = Counter(concept.subgroup for concept in core)
        subgroups = sorted((name for name in sizes if sizes[name] >= CLASS_FROM), key=lambda name: (-sizes[name], name))
        if concepts is not None and concepts > len(core):
            raise ValueError(f"concepts: at most {len(core)}, got {concepts}")
        parameters["concepts"] = len(core) if concepts is None else concepts
        super().__init__(parameters | DESIGNERS, root)
        self.seed = seed
        self.language = language
        self.size = size
        uses = Counter(word for concept in core for word in set(concept.keywords[language]))
        self.tag_names = tuple(sorted(word for word, count in uses.items() if count >= TAG_FROM))
        self.class_names = tuple(sorted(subgroups[:classes]))
        count = self.parameters["concepts"]
        self.concepts = tuple(core[row * len(core) // count] for row in range(count))
        self._classified = tuple(concept for concept in core if concept.subgroup in self.class_names)

    def _rng(self, style: str, concept: Concept, seeded: bool, stream: int) -> np.random.Generator:
        return np.random.default_rng([1 + self.seed if seeded else 0, STYLE_NUMBERS[style], concept.index, stream])

    def _image(self, style: str, concept: Concept, drawing: np.ndarray, seeded: bool) -> np.ndarray:
        ground = self._rng(style, concept, seeded, _GROUND).uniform(*LIGHT, size=3)
        return compose(drawing, ground, self.size)

    def _captioned(
        self,
        style: str,
        concepts: Sequence[Concept],
        seeded: bool,
        folder: Path,
        name_of: Callable[[int], str],
        write: Write,
    ) -> list[Annotated]:
        images = []
        for concept, drawing in zip(concepts, read_drawings(style, [concept.index for concept in concepts])):
            number = picture_number(style, concept)
            path = folder / name_of(number)
            write(path, partial(write_jpeg, path, self._image(style, concept, drawing, seeded)))
            captions = captions_of(self._rng(style, concept, seeded, _WORDS), concept, self.language)
            images.append(
                Annotated(
                    number,
                    path.name,
                    self.size,
                    self.size,
                    captions,
                    self._instances(concept, drawing),
                    concept.index,
                    STYLE_NUMBERS[style] - 1,
                )
            )
        return images

    def _instances(self, concept: Concept, drawing: np.ndarray) -> tuple[Instance, ...]:
        """Return one object per tag. Each object's box is that of the whole drawing."""
        opacity, scale = drawing[..., 3] / 255, self.size / CELL
        rows, columns = np.nonzero(opacity >= _OPAQUE)
        left, right = scale * columns.min(), scale * (columns.max() + 1)
        top, bottom = scale * rows.min(), scale * (rows.max() + 1)
        outline = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        area = float(opacity.sum()) * scale**2
        box = (float(left), float(top), float(right), float(bottom))
        tags = set(concept.keywords[self.language])
        return tuple(Instance(n, box, area, outline) for n, tag in enumerate(self.tag_names) if tag in tags)

    # -- layouts -------------------------------------------------------------------------------------------------------

    def _fill_coco(self, root: Path, write: Write) -> None:
        categories = tuple((tag, "keyword") for tag in self.tag_names)
        vocabulary = Vocabulary(f"Emoji world. {CREDIT}", categories, tuple(STYLES.values()))
        for split, styles in (("train2017", TRAIN_STYLES), ("val2017", (TEST_STYLE,))):
            seeded = split == "train2017"
            images = [
                image
                for style in styles
                for image in self._captioned(style, self.concepts, seeded, root / split, coco_name, write)
            ]
            write_coco(root, split, sorted(images, key=lambda image: image.number), vocabulary)

    def _fill_coco_karpathy(self, root: Path, write: Write) -> None:
        *whole, last = TRAIN_STYLES
        # A small selection of concepts may contain no val concept.
        chosen = [concept for concept in self.concepts if concept.split == "val"] or [self.concepts[-1]]
        others = [concept for concept in self.concepts if concept not in chosen]
        sources: dict[str, list[tuple[str, Sequence[Concept]]]] = {
            "train": [*((style, self.concepts) for style in whole), (last, others)],
            "val": [(last, chosen)],
            "test": [(TEST_STYLE, self.concepts)],
        }
        parts: dict[str, list[Annotated]] = {}
        for part, pairs in sources.items():
            folder, name_of = root / karpathy_folder(part), partial(karpathy_name, split=part)
            parts[part] = [
                image
                for style, concepts in pairs
                for image in self._captioned(style, concepts, part == "train", folder, name_of, write)
            ]
        write_karpathy(root, parts)

    def _fill_imagenet(self, root: Path, write: Write) -> None:
        indices = [concept.index for concept in self._classified]
        for style in (*TRAIN_STYLES, TEST_STYLE):
            for concept, drawing in zip(self._classified, read_drawings(style, indices)):
                trained = self._trained(style, concept)
                number = picture_number(style, concept)
                label = self.class_names.index(concept.subgroup)
                path = imagenet_path(root, "train" if trained else "val", label, number)
                write(path, partial(write_jpeg, path, self._image(style, concept, drawing, trained)))
        write_class_names(root, self.class_names)

    def _trained(self, style: str, concept: Concept) -> bool:
        """Whether a drawing is in ImageNet's training split."""
        return concept.split == "train"


class EmojiByDesigner(EmojiWorld):
    """An emoji world whose ImageNet is split by designer, like COCO."""

    kind = "emoji_by_designer"
    title = "emoji world by designer"

    def _trained(self, style: str, concept: Concept) -> bool:
        return style != TEST_STYLE
