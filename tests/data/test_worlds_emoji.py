"""The emoji world: what the pack holds, what is made of it, and that it is passed on with its licenses."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.imagenet import ImageNet
from common.data.worlds.base import World
from common.data.worlds.emoji import (
    CREDIT,
    STYLES,
    Concept,
    EmojiByDesigner,
    EmojiWorld,
    captions_of,
    pack,
    read_concepts,
)
from tests.data.worlds import tiny


@pytest.fixture(scope="module")
def world(rendered: Callable[[type[World]], Any]) -> EmojiWorld:
    return rendered(EmojiWorld)


@pytest.fixture(scope="module")
def core() -> tuple[Concept, ...]:
    return tuple(concept for concept in read_concepts() if concept.core)


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def style_of(number: int) -> str:
    return tuple(STYLES)[number // 10_000 - 1]


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


def test_a_concept_without_other_keywords_still_has_captions(core: tuple[Concept, ...]) -> None:
    alone = next(concept for concept in core if len(concept.keywords["en"]) == 1)
    said = captions_of(np.random.default_rng(0), alone)
    assert len(said) == 5
    assert all(said)
    rng = np.random.default_rng(1)
    bare = Concept(0, "", "", "", "train", (), {"en": "ink"}, {"en": ("Ink",)})
    assert captions_of(rng, bare) == ("ink",) * 5


# ------------------------------------------------------------------------------------------------------------ Karpathy
def test_karpathy(world: EmojiWorld) -> None:
    images = load(world.root_of("coco_karpathy") / "dataset_coco.json")["images"]
    chosen = [concept.index for concept in world.concepts if concept.split == "val"]
    counts = Counter(image["split"] for image in images)
    assert counts == {"train": 120 - len(chosen), "val": len(chosen), "test": 40}
    shown = {split: {image["cocoid"] for image in images if image["split"] == split} for split in counts}
    assert {style_of(number) for number in shown["test"]} == {"twemoji"}
    assert {style_of(number) for number in shown["val"]} == {"fluent_flat"}
    assert sorted(number % 10_000 for number in shown["val"]) == chosen
    assert not shown["train"] & (shown["val"] | shown["test"])
    # Every concept is seen in training, by other drawings.
    assert {number % 10_000 for number in shown["train"]} == {concept.index for concept in world.concepts}
    dataset = COCOKarpathy(world.root_of("coco_karpathy"))
    for split, count in counts.items():
        assert len(dataset.listing(split)) == count
        groups = dataset.annotations(split).groups
        assert set(groups.tolist()) <= {concept.index for concept in world.concepts}


# ------------------------------------------------------------------------------------------------------------ ImageNet
def test_imagenet(world: EmojiWorld, core: tuple[Concept, ...]) -> None:
    root = world.root_of("imagenet")
    names = dict(line.split(" ", 1) for line in (root / "LOC_synset_mapping.txt").read_text().splitlines())
    assert tuple(names.values()) == world.class_names
    by_index = {concept.index: concept for concept in core}
    shown: dict[str, set[int]] = {}
    for split in ("train", "val"):
        listing = ImageNet(root).listing(split)
        assert listing.classes == tuple(names)
        numbers = [int(Path(name).stem.rpartition("_")[2]) for name in listing.names]
        shown[split] = {number % 10_000 for number in numbers}
        assert Counter(map(style_of, numbers)) == dict.fromkeys(STYLES, len(shown[split]))
        for number, label in zip(numbers, listing.labels.tolist()):
            concept = by_index[number % 10_000]
            assert concept.subgroup == names[listing.classes[label]]
            assert (concept.split == "train") == (split == "train")
    assert not shown["train"] & shown["val"]


def test_imagenet_by_designer(tmp_path: Path) -> None:
    world = tiny(EmojiByDesigner, tmp_path)
    world.prepare(["imagenet"])
    shown: dict[str, list[int]] = {}
    for split in ("train", "val"):
        listing = ImageNet(world.root_of("imagenet")).listing(split)
        shown[split] = [int(Path(name).stem.rpartition("_")[2]) for name in listing.names]
        assert {number // 10_000 for number in shown[split]} == ({1, 2, 3} if split == "train" else {4})
    assert {number % 10_000 for number in shown["train"]} == {number % 10_000 for number in shown["val"]}
    assert world.folder != tiny(EmojiWorld, tmp_path).folder


# ---------------------------------------------------------------------------------------------------- draws and folders
@pytest.mark.parametrize("language", ["cs", "zh"])
def test_other_languages_can_be_rendered(tmp_path: Path, language: str) -> None:
    world = tiny(EmojiWorld, tmp_path, concepts=6, language=language)
    world.prepare(["coco"])
    known = COCO(world.root_of("coco")).annotations("val")
    assert [captions[0] for captions in known.captions] == [concept.name[language] for concept in world.concepts]
    assert len(known.tag_names) > 150
