"""The narrated world: what is drawn is what the words say, and every file lies where the real sets have it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from common.data.datasets.avsd import AVSD
from common.data.datasets.esc50 import ESC50
from common.data.datasets.kinetics import Kinetics400
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA
from common.data.media import open_media
from common.data.worlds.base import World
from common.data.worlds.narrated import (
    AUDIO_CATEGORIES,
    COLOURS,
    DIRECTIONS,
    PITCHES,
    QUESTIONS,
    SHAPES,
    SOURCE,
    SPEAKERS,
    TARGET,
    TIMBRES,
    VIDEO_WORDS,
    Domain,
    NarratedWorld,
    Scene,
    kind_of,
    render_frames,
    render_sound,
    sentences,
)
from common.reporting.papers import project_root
from tests.data.worlds import tiny

RED_CIRCLE = Scene("circle", "red", "left", "beep", "high", "anna")


@pytest.fixture(scope="module")
def world(rendered: Callable[[type[World]], Any]) -> NarratedWorld:
    return rendered(NarratedWorld)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- pictures and sounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", [SOURCE, TARGET])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_objects_move_where_the_word_says(domain: object, direction: str) -> None:
    scene = Scene("square", "red", direction, "beep", "high", "anna")
    for seed in range(5):
        frames = render_frames(scene, domain, 24, 9, rng(seed)).astype(float)  # type: ignore[arg-type]
        assert frames.shape == (9, 24, 24, 3)
        # Where the last frame differs from the first, red came on the side that the word names.
        change = frames[-1, ..., 0] - frames[-1, ..., 1] - frames[0, ..., 0] + frames[0, ..., 1]
        weight = np.maximum(change, 0) - np.maximum(-change, 0)
        axis = 1 if direction in ("left", "right") else 0
        moved = (weight.sum(axis=1 - axis) * np.arange(24)).sum()
        assert (moved < 0) == (direction in ("left", "up"))


@pytest.mark.parametrize("colour", COLOURS)
def test_objects_have_the_colour_of_the_word(colour: str) -> None:
    scene = Scene("square", colour, "left", "beep", "high", "anna")
    frames = render_frames(scene, SOURCE, 24, 2, rng(1)).astype(float)
    strong = frames[0].reshape(-1, 3)[np.argsort(frames[0].reshape(-1, 3).std(axis=1))[-40:]].mean(axis=0)
    red, green, blue = strong
    assert {
        "red": red > 1.5 * max(green, blue),
        "green": green > 1.5 * max(red, blue),
        "blue": blue > 1.5 * max(red, green),
        "yellow": min(red, green) > 1.5 * blue,
    }[colour]


def test_shapes_differ_in_their_outline() -> None:
    areas = {}
    plain = replace(SOURCE, background=0.0, pixel_noise=0.0, opacity=(1.0, 1.0), travel=(0.1, 0.1))
    for shape in SHAPES:
        frames = render_frames(Scene(shape, "red", "up", "beep", "high", "anna"), plain, 64, 2, rng(2)).astype(float)
        inside = frames[0, ..., 0] - frames[0, ..., 2] > 80
        rows = np.flatnonzero(inside.any(axis=1))
        box = inside[rows[0] : rows[-1] + 1, inside.any(axis=0)]
        areas[shape] = box.mean(), box[-len(box) // 3 :].sum() / box.sum()
    assert areas["square"][0] > 0.95
    assert 0.7 < areas["circle"][0] < 0.85
    assert areas["triangle"][0] < 0.6
    assert areas["triangle"][1] > 0.5


@pytest.mark.parametrize(
    ("domain", "pitch", "low", "high"),
    [(SOURCE, "low", 180, 320), (SOURCE, "high", 800, 1400), (TARGET, "low", 500, 750), (TARGET, "high", 1300, 2100)],
)
def test_a_beep_has_the_pitch_of_the_word(domain: Domain, pitch: str, low: float, high: float) -> None:
    scene = Scene("circle", "red", "left", "beep", pitch, "anna")
    for seed in range(5):
        samples = render_sound(scene, domain, 8000, 8000, rng(seed))
        assert samples.dtype == np.float32
        assert np.abs(samples).max() <= 1
        loudest = np.abs(np.fft.rfft(samples))[50:].argmax() + 50
        assert low - 2 <= loudest <= high + 2


def test_timbres_differ_in_their_partials() -> None:
    def share(timbre: str, partial: int) -> float:
        found = []
        for seed in range(8):
            sound = render_sound(Scene("circle", "red", "left", timbre, "low", "anna"), SOURCE, 8000, 8000, rng(seed))
            power = np.abs(np.fft.rfft(sound)) ** 2
            base = int(power[150:350].argmax()) + 150
            near = slice(partial * base - 5, partial * base + 6)
            found.append(power[near].sum() / power[base - 5 : base + 6].sum())
        return float(np.median(found))

    assert share("buzz", 3) > 5 * share("beep", 3)
    # Noise has no line at its strongest frequency.
    hiss = render_sound(Scene("circle", "red", "left", "hiss", "low", "anna"), SOURCE, 8000, 8000, rng(0))
    power = np.sort(np.abs(np.fft.rfft(hiss)) ** 2)
    assert power[-3:].sum() < 0.2 * power.sum()


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


def test_source_clips_in_the_layout_of_kinetics(world: NarratedWorld) -> None:
    dataset = Kinetics400(world.root_of("kinetics400"))
    listing = dataset.listing("train")
    assert len(listing) == 48
    assert set(np.bincount(listing.labels).tolist()) == {1}
    assert len(listing.classes) == 48
    for name in listing.classes:
        colour, shape, direction = name.split()
        assert (colour in COLOURS, shape in SHAPES, direction in DIRECTIONS) == (True, True, True)
    assert len(dataset.listing("validation")) == 6
    with open_media(listing[0].path) as media:
        assert media.audio_limits is None
        assert media.read_video(0.0, 1.5, 6.0)[0].shape == (9, 24, 24, 3)


def test_source_sounds_in_the_layout_of_esc(world: NarratedWorld) -> None:
    listing = ESC50(world.root_of("esc50")).listing("all")
    assert len(listing) == 30
    assert np.bincount(listing.numbers["fold"]).tolist() == [0] + [6] * 5
    assert {frozenset(name.split("_")) for name in listing.classes} == {
        frozenset((pitch, timbre)) for pitch in PITCHES for timbre in TIMBRES
    }


def test_dialogues(world: NarratedWorld) -> None:
    dataset = AVSD(world.root_of("avsd"))
    status = dataset.status()
    assert status.present
    assert status.counts == {"train": 12, "valid": 3, "test": 28}
    subtitles, words = dataset.subtitles(), dataset.words()
    assert subtitles is not None
    for split in ("train", "valid", "test"):
        for place, dialog in enumerate(dataset.dialogs(split)):
            scene = world.scene(f"avsd/{split}", place)
            assert words[dialog.video] == (scene.video_words, (scene.audio_category,))
            assert subtitles[dialog.video][0].text == f"hello i am {scene.speaker}"
            kinds = [kind_of(turn.question) for turn in dialog.turns]
            assert len(set(kinds)) == len(kinds)
            assert [turn.answer for turn in dialog.turns] == [scene.answer(kind) for kind in kinds]
            assert len(dialog.turns) == 4 or split == "test"
    tested = dataset.dialogs("test")
    # Each question is asked last, after none to three others.
    asked = {(kind_of(dialog.turns[-1].question), len(dialog.turns)) for dialog in tested}
    assert asked == {(kind, turns) for kind in QUESTIONS for turns in range(1, 5)}
    assert all(len(set(dialog.references)) == 6 for dialog in tested)
    assert all(dialog.references[0] == dialog.turns[-1].answer for dialog in tested)
    raw = json.loads((world.root_of("avsd") / "test_set4DSTC7-AVSD.json").read_text())
    assert {dialog["dialog"][-1]["answer"] for dialog in raw["dialogs"]} == {"__UNDISCLOSED__"}
    with open_media(dataset.listing("train")[0].path) as media:
        assert media.audio_limits is not None
        assert media.read_audio(0.0, 1.0, 8000).shape == (8000,)


def test_questions_with_options(world: NarratedWorld) -> None:
    dataset = TVQA(world.root_of("tvqa"))
    assert dataset.status().present
    listing, questions, subtitles = dataset.listing("train"), dataset.questions("train"), dataset.subtitles()
    assert len(listing) == 20
    assert not any(question.clip.startswith("bbt") for question in questions)
    assert any(question.clip.startswith("s01") for question in questions)
    for question in questions:
        assert len(set(question.options)) == 5
        if question.text.startswith("who speaks"):
            heard = [line.text for line in subtitles[question.clip]]
            assert f"hello i am {question.options[question.answer]}" in heard
        else:
            assert question.options[question.answer] in dataset.words()[question.clip][0]
    assert dataset.listing("test").labels.tolist() == [-1] * 10
    with open_media(listing[0].path) as media:
        assert media.video_limits == (0.0, 4.0)
        assert media.audio_limits is None


def test_moments(world: NarratedWorld) -> None:
    dataset = TVC(world.root_of("tvc"))
    assert dataset.status().present
    subtitles = dataset.subtitles()
    for split, count in (("train", 2), ("val", 4), ("test", 0)):
        for moment in dataset.moments(split):
            assert len(moment.descriptions) == count
            speaker = next(line.text for line in subtitles[moment.clip] if line.overlaps(moment.span)).split()[-1]
            for description in moment.descriptions:
                assert (speaker in description.text.split()) == (description.kind == "vt")
    assert {description.kind for description in dataset.moments("train")[0].descriptions} == {"v", "vt"}


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
