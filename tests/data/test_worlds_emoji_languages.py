"""Test the emoji world in six languages: splits, texts and dictionaries, and reading all files as data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.datasets.coco_cn import COCOCN
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.conceptual_captions import ConceptualCaptions
from common.data.datasets.multi30k import Multi30K
from common.data.datasets.stair_captions import STAIRCaptions
from common.data.datasets.wikipedia import WikipediaText
from common.data.worlds.base import World
from common.data.worlds.emoji import LANGUAGES, Concept
from common.data.worlds.emoji_languages import EmojiLanguagesWorld, induced_dictionary, plain
from tests.data.worlds import tiny


@pytest.fixture(scope="module")
def world(rendered: Callable[[type[World]], Any]) -> EmojiLanguagesWorld:
    return rendered(EmojiLanguagesWorld)


@pytest.fixture(scope="module")
def sets(world: EmojiLanguagesWorld) -> dict[str, Any]:
    kinds: list[Any] = [ConceptualCaptions, Multi30K, COCOKarpathy, STAIRCaptions, COCOCN, WikipediaText]
    made = [kind("?") for kind in kinds]
    for dataset in made:
        world.place(dataset)
    return {dataset.name: dataset for dataset in made}


# ---------------------------------------------------------------------------------------------------- division
def test_the_whole_world_has_the_sizes_it_says() -> None:
    sizes = {"concepts": None, "test": 300, "fine_tune": 400}
    whole, other = (tiny(EmojiLanguagesWorld, None, seed=seed, **sizes) for seed in (3, 7))
    parts = (whole.test_concepts, whole.fine_tune_concepts, whole.pretraining_concepts)
    assert [len(part) for part in parts] == [300, 400, 118]
    assert len({concept.index for part in parts for concept in part}) == 818
    assert all(concept.core for part in parts for concept in part)
    assert whole.held_out_concepts == whole.text_concepts[:40]
    # Every seed uses the same test pictures.
    assert other.test_concepts == whole.test_concepts
    coverage = {language: len(entries) for language, entries in whole.dictionaries.items()}
    assert sorted(coverage) == ["cs", "de", "fr", "ja", "zh"]
    assert min(coverage.values()) > 500
    assert len(tiny(EmojiLanguagesWorld, None, concepts=8, test=1, fine_tune=1).pretraining_concepts) == 6


def test_chinese_captions_may_cover_a_share_of_the_training_concepts(tmp_path: Path) -> None:
    concepts: dict[float, dict[str, set[int]]] = {}
    for share in (0.25, 0.5, 1.0):
        made = tiny(EmojiLanguagesWorld, tmp_path, unseen="drawings", chinese=share)
        made.prepare(["coco_cn", "stair_captions"])
        chinese = COCOCN(made.root_of("coco_cn"), tmp_path)
        concepts[share] = {split: set(rows_by_concept(chinese.captions(split))) for split in ("train", "test")}
        assert concepts[share]["test"] == {concept.index for concept in made.test_concepts}
        assert len(concepts[share]["train"]) == share * len(made.tuned_concepts)
    assert concepts[0.25]["train"] < concepts[0.5]["train"] < concepts[1.0]["train"]


def test_drawings_alone_may_be_unseen(tmp_path: Path) -> None:
    made = tiny(EmojiLanguagesWorld, tmp_path, unseen="drawings")
    other = tiny(EmojiLanguagesWorld, None)
    assert (made.test_concepts, made.fine_tune_concepts) == (other.test_concepts, other.fine_tune_concepts)
    assert made.dictionaries == other.dictionaries
    made.prepare(["stair_captions", "coco_cn", "wikipedia"])
    tested = {concept.index: concept for concept in made.test_concepts}
    assert set(tested) < {concept.index for concept in made.pretraining_concepts}
    assert set(tested) < {concept.index for concept in made.tuned_concepts}
    assert set(tested) < {concept.index for concept in made._shown}
    assert not set(tested) & {concept.index for concept in made.held_out_concepts}
    chinese = COCOCN(made.root_of("coco_cn"), tmp_path)
    styles = {split: {int(key[-12:]) // 10_000 for key in chinese.captions(split).keys} for split in ("train", "test")}
    assert styles == {"train": {1, 2, 3}, "test": {4}}
    # No training text contains the sentence of a query, and no text without a picture names the concept.
    captions = {split: rows_by_concept(chinese.captions(split)) for split in ("train", "test")}
    text = WikipediaText(made.root_of("wikipedia"))
    said = {line for language in LANGUAGES for line in text.sentences("train", language)}
    for index, shown in tested.items():
        if set(map(plain, shown.keywords["zh"])) - {plain(shown.name["zh"])}:
            assert captions["train"][index]
            assert not captions["test"][index] & captions["train"][index]
        assert plain(shown.name["cs"]) not in said


def rows_by_concept(captions: Any) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for key, texts in zip(captions.keys, captions.captions):
        found.setdefault(int(key[-12:]) % 10_000, set()).update(texts)
    return found


# ---------------------------------------------------------------------------------------------------- dictionaries
def concept(index: int, en: tuple[str, ...], de: tuple[str, ...]) -> Concept:
    name = {"en": en[0], "de": de[0]}
    return Concept(index, "", "", "", "train", (), name, {"en": en[1:], "de": de[1:]})


def test_dictionaries_are_induced_as_specified() -> None:
    concepts = [
        concept(0, ("big dog", "pet"), ("Großer Hund", "Hund", "Haustier")),
        concept(1, ("small dog", "pet"), ("Kleiner Hund", "Hund", "Haustier")),
        concept(2, ("cat", "pet"), ("Katze", "Haustier")),
        concept(3, ("tree",), ("Baum",)),
    ]
    found = induced_dictionary(concepts, "de")
    # "dog" and "haustier" have a Dice score of 2 * 2 / (2 + 3). "cat" shares only one concept, which is too few.
    assert found == {"dog": ["hund", "haustier"], "pet": ["haustier", "hund"]}


# ---------------------------------------------------------------------------------------------------- the same again
def test_another_seed_changes_training_and_leaves_the_test(tmp_path: Path, world: EmojiLanguagesWorld) -> None:
    other = tiny(EmojiLanguagesWorld, tmp_path, seed=4)
    other.prepare(["coco_cn"])
    mine, theirs = COCOCN(world.root_of("coco_cn")), COCOCN(other.root_of("coco_cn"))
    assert mine.captions("test").captions == theirs.captions("test").captions
    assert mine.captions("train").captions != theirs.captions("train").captions
    drawing = np.full((64, 64, 4), 128, dtype=np.uint8)
    shown = world.test_concepts[0]
    for trained in (False, True):
        pixels = [made._image("noto", shown, drawing, 0, trained) for made in (world, other)]
        assert (pixels[0] == pixels[1]).all() == (not trained)
