"""The emoji world: what the pack holds, what is made of it, and that it is passed on with its licenses."""

import re
from pathlib import Path

import numpy as np
import pytest

from common.data.datasets.coco import COCO
from common.data.worlds.emoji import (
    CREDIT,
    STYLES,
    Concept,
    EmojiWorld,
    captions_of,
    pack,
    read_concepts,
)
from tests.data.worlds import tiny


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
