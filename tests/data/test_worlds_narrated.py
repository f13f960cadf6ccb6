"""The narrated world: what is drawn is what the words say, and every file lies where the real sets have it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.data.datasets.avsd import AVSD
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA
from common.data.worlds.base import World
from common.data.worlds.narrated import NarratedWorld, sentences
from tests.data.worlds import tiny


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
