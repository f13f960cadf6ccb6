"""Test what the worlds draw and describe: emoji, shapes, two-sided pictures, and narrated clips."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask

from common.data.datasets.avsd import AVSD
from common.data.datasets.coco import COCO
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA
from common.data.worlds.base import World
from common.data.worlds.emoji import (
    CREDIT,
    STYLES,
    Concept,
    EmojiWorld,
    captions_of,
    pack,
    read_concepts,
)
from common.data.worlds.emoji_scenes import EmojiScenesWorld
from common.data.worlds.glyphs import COLOUR_NAMES, GLYPHS, coverage, draw, mixed_scene, repeated_scene
from common.data.worlds.narrated import NarratedWorld, sentences
from common.data.worlds.shapes import ShapesWorld
from common.data.worlds.two_objects import TwoObjectsWorld
from common.data.worlds.two_sides import TwoSidesWorld
from tests.data.worlds import read_caption, tiny


def test_every_file_of_the_attribution_is_there() -> None:
    text = (pack() / "ATTRIBUTION.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert {f"{style}.webp" for style in STYLES} | {"emoji.jsonl", "README.md"} <= named
    for name in named:
        assert (pack() / name).is_file(), name
    licenses = {entry.name for entry in (pack() / "licenses").iterdir()}
    assert {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "Unicode-3.0"} <= licenses
    assert {name for name in licenses if name.startswith("MIT")} == {"MIT-emoji-data", "MIT-fluentui-emoji"}
    assert {entry.name for entry in pack().iterdir()} == named | {"licenses"}
    assert CREDIT in text


def test_a_concept_without_other_keywords_still_has_captions() -> None:
    alone = next(concept for concept in read_concepts() if concept.core and len(concept.keywords["en"]) == 1)
    said = captions_of(np.random.default_rng(0), alone)
    assert len(said) == 5
    assert all(said)
    rng = np.random.default_rng(1)
    bare = Concept(0, "", "", "", "train", (), {"en": "ink"}, {"en": ("Ink",)})
    assert captions_of(rng, bare) == ("ink",) * 5


@pytest.mark.parametrize("language", ["cs", "zh"])
def test_other_languages_can_be_rendered(tmp_path: Path, language: str) -> None:
    world = tiny(EmojiWorld, tmp_path, concepts=6, language=language)
    world.prepare(["coco"])
    every = tiny(EmojiWorld, tmp_path, concepts=None)
    assert tiny(EmojiWorld, tmp_path, concepts=len(every.concepts)).folder == every.folder
    known = COCO(world.root_of("coco")).annotations("val")
    assert [captions[0] for captions in known.captions] == [concept.name[language] for concept in world.concepts]
    assert len(known.tag_names) > 150


@pytest.mark.parametrize(("probe", "classes"), [("glyph", 16), ("colour", 6), ("count", 3), ("coloured_glyph", 96)])
def test_imagenet(rendered: Callable[[type[World]], Any], probe: Any, classes: int) -> None:
    world = rendered(ShapesWorld)
    other = tiny(ShapesWorld, world.folder.parent, probe=probe)
    assert other.folder == world.folder  # worlds with other classes share this folder
    other.prepare(["imagenet"])
    root = other.root_of("imagenet")
    assert root.name == f"imagenet-{probe}"
    names = dict(line.split(" ", 1) for line in (root / "LOC_synset_mapping.txt").read_text().splitlines())
    assert len(names) == classes
    shown = {folder.name for folder in (*(root / "train").iterdir(), *(root / "val").iterdir())}
    dataset = ImageNet(root)
    for split, count in (("train", 48), ("val", 32)):
        listing = dataset.listing(split)
        assert (len(listing), set(listing.classes)) == (count, shown)
    index = 7
    _, attributes = repeated_scene(np.random.default_rng([6, 6, index, 0]), index % 16)
    path = next((root / "train").glob(f"*/*_{index + 1}.JPEG"))
    said = {"glyph": GLYPHS[attributes.glyph], "colour": COLOUR_NAMES[attributes.colour]}
    said["count"] = ("two", "three", "four")[attributes.count - 2]
    said["coloured_glyph"] = f"{said['colour']} {said['glyph']}"
    assert names[path.parent.name] == said[probe]


def test_coverage_of_a_box_is_exact() -> None:
    box = np.array([[2.25, 1.5], [5.5, 1.5], [5.5, 4.0], [2.25, 4.0]])
    row = np.array([0, 0, 0.75, 1, 1, 0.5, 0, 0])
    expected = np.outer([0, 0.5, 1, 1, 0, 0, 0, 0], row)
    np.testing.assert_allclose(coverage([[box]], 8)[0], expected, atol=1e-12)
    # If a box extends beyond the picture, only the area inside counts.
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


# Attributes that at least one picture must show.
SHOWN = {TwoObjectsWorld: (0, 1, 2, 3, 0), EmojiScenesWorld: (0, 6, 2)}
every_kind = pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: kind.kind)


@every_kind
def test_relations_replace_a_share_of_the_captions(kind: type[TwoSidesWorld], tmp_path: Path) -> None:
    shown = SHOWN[kind]
    texts = [text for row in range(50) for text in tiny(kind, tmp_path, relations=0.5).captions("train", row, shown)]
    related = [text for text in texts if " of a " in text]
    assert 0.4 < len(related) / len(texts) < 0.6
    assert {read_caption(text, kind) for text in texts} == {shown}


def test_the_sentences_hold_every_word_of_every_file(rendered: Callable[[type[World]], Any]) -> None:
    world = rendered(NarratedWorld)
    known = {word for sentence in sentences() for word in sentence.split()}
    used: set[str] = set()
    dataset = AVSD(world.root_of("avsd"))
    for split in dataset.splits:
        for dialog in dataset.dialogs(split):
            used.update(f"{dialog.caption} {dialog.summary}".split())
            for text in [*dialog.references, *(f"{turn.question} {turn.answer}" for turn in dialog.turns)]:
                used.update(text.split())
    for question in TVQA(world.root_of("tvqa")).questions("train"):
        used.update(" ".join([question.text, *question.options]).split())
    for moment in TVC(world.root_of("tvc")).moments("val"):
        used.update(" ".join(description.text for description in moment.descriptions).split())
    for lines in TVQA(world.root_of("tvqa")).subtitles().values():
        used.update(" ".join(line.text for line in lines).split())
    assert used <= known


def test_moments_bring_the_films_that_they_describe(tmp_path: Path) -> None:
    other = tiny(NarratedWorld, tmp_path)
    other.prepare(["tvc"])
    assert sorted(path.name for path in other.folder.iterdir() if path.is_dir()) == ["tvc", "tvqa"]
