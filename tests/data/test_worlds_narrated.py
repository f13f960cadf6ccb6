"""The narrated world: what is drawn is what the words say, and every file lies where the real sets have it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.data.datasets.avsd import AVSD
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA
from common.data.worlds.base import World
from common.data.worlds.narrated import (
    AUDIO_CATEGORIES,
    PITCHES,
    QUESTIONS,
    SPEAKERS,
    TIMBRES,
    VIDEO_WORDS,
    NarratedWorld,
    Scene,
    sentences,
)
from common.reporting.papers import project_root
from tests.data.worlds import tiny

RED_CIRCLE = Scene("circle", "red", "left", "beep", "high", "anna")


@pytest.fixture(scope="module")
def world(rendered: Callable[[type[World]], Any]) -> NarratedWorld:
    return rendered(NarratedWorld)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_answers_tell_the_words_of_the_scene() -> None:
    assert RED_CIRCLE.answer("caption") == "a red circle moves left with a high beep"
    told = {"shape": "circle", "color": "red", "motion": "left", "sound": "beep", "pitch": "high", "speaker": "anna"}
    assert {*told, "caption"} == set(QUESTIONS)
    for kind, word in told.items():
        answers = RED_CIRCLE.answers(kind)
        assert len(answers) == len(set(answers)) == 6
        assert all(word in answer.split() for answer in answers)
        others = {*VIDEO_WORDS, *TIMBRES, *PITCHES, *SPEAKERS} - {word}
        assert not any(others & set(answer.split()) for answer in answers)
    for caption in RED_CIRCLE.answers("caption"):
        assert set(RED_CIRCLE.video_words + RED_CIRCLE.audio_words) <= set(caption.split())
    for omitted in range(3):
        assert len({"circle", "red", "left"} & set(RED_CIRCLE.caption(omitted).split())) == 2
        assert not {*TIMBRES, *PITCHES} & set(RED_CIRCLE.caption(omitted).split())
    for omitted in range(2):
        assert len({*TIMBRES, *PITCHES} & set(RED_CIRCLE.summary(omitted).split())) == 1


def test_the_sentences_hold_every_word_of_every_file(world: NarratedWorld) -> None:
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
    assert sentences() == sentences()


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_moments_bring_the_films_that_they_describe(tmp_path: Path) -> None:
    other = tiny(NarratedWorld, tmp_path)
    other.prepare(["tvc"])
    assert sorted(path.name for path in other.folder.iterdir() if path.is_dir()) == ["tvc", "tvqa"]


def test_categories_are_those_of_the_recipes() -> None:
    def found(node: object) -> Iterator[tuple[str, ...]]:
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            if isinstance(value, list) and any(" beep" in str(name) for name in value):
                yield tuple(value)
            yield from found(value)

    for name in ("audio_words", "mini", "smoke"):
        listed = list(found(yaml.safe_load((project_root() / f"configs/vx2text/{name}.yaml").read_text())))
        assert listed
        assert set(listed) == {AUDIO_CATEGORIES}
