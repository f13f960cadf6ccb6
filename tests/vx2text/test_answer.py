"""Test a finished stage on a user's clip, and the figures that the stage wrote."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assemble.stages.run import run_stage
from common.data.media import MediaError
from common.errors import StageError
from papers.vx2text import VX2Text
from papers.vx2text.monitoring import listed_categories
from tests.data.media_factory import tone, write_video, write_wav
from tests.data.text_layouts import write_frames
from tests.stages import request, shared


@pytest.fixture(scope="module")
def stages() -> dict[str, Path]:
    """Train the three tasks and their parents for a few steps, and return their folders."""
    done = {}
    with shared("vx2text") as runs:
        for name in ("video_words", "audio_words", "text_words", "text_words_questions", "text_words_captions",
                     "avsd", "tvqa", "tvqa_no_decoder", "tvc"):  # fmt: skip
            stage = request(f"vx2text/{name}", runs)
            run_stage(stage, unless_done=True)
            done[name] = stage.directory
    return done


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 40, 3), dtype=np.uint8)
    write_video(folder / "silent.mp4", frames=frames, fps=8.0, with_audio=False)
    return write_video(folder / "clip.mp4", frames=frames, fps=8.0, audio=tone(1.5, 8_000), audio_rate=8_000)


@pytest.fixture(scope="module")
def model(stages: dict[str, Path]) -> Callable[[str], VX2Text]:
    """Return a function that loads the model of a stage."""
    return cache(lambda name: VX2Text.from_export(checkpoint(stages, name)))


def checkpoint(stages: dict[str, Path], name: str) -> Path:
    return stages[name] / "checkpoints" / "last.ckpt"


def test_every_task_writes_text_and_always_the_same(model: Any, clip: Path, tmp_path: Path) -> None:
    more: Any = {"speech": ["hello i am anna"], "history": [("a", "b")]}
    first, second = (model("avsd").answer(clip, "what is moving?", **more) for _ in range(2))
    assert isinstance(first, str)
    assert first == second
    assert isinstance(model("avsd").answer(clip.with_name("silent.mp4"), "was bewegt sich? 何が"), str)
    assert isinstance(model("avsd").answer(write_wav(tmp_path / "sound.wav", 1.5, 8_000), "what?"), str)
    options = ["red", "green", "blue", "yellow", "white"]
    for name in ("tvqa", "tvqa_no_decoder"):
        assert model(name).answer(clip, "what color is it ?", options=options) in options
    for path in (clip, write_frames(tmp_path, range(1, 10))):
        assert isinstance(model("tvc").caption(path), str)


def test_words_that_the_model_does_not_know_are_named(model: Any) -> None:
    assert model("avsd").notes("where does it move ?") == []
    assert model("avsd").notes("where does a zebra move ?") == ["the model does not know zebra"]
    assert model("avsd").notes("who speaks ?", ["hello i am bob"]) == ["the model does not know bob"]
    (note,) = model("avsd").notes("where does it move?")
    assert note.startswith("the model does not know move?; try marks apart from words")


FIVE: Any = {"options": list("abcde")}
REFUSED: tuple[tuple[str, Callable[[VX2Text, Path], str], type[Exception], str], ...] = (
    ("avsd", lambda model, clip: model.answer(clip, "  "), StageError, "question"),
    ("avsd", lambda model, clip: model.answer(clip, "what?", **FIVE), StageError, "--option"),
    ("avsd", lambda model, clip: model.answer(clip, "what?", known="a man"), StageError, "data.prompt.caption"),
    ("avsd", lambda model, clip: model.caption(clip), StageError, "assemble answer"),
    ("tvqa", lambda model, clip: model.answer(clip, "what?", options=["a", "b"]), StageError, "--option"),
    ("tvqa", lambda model, clip: model.answer(clip, "what?", history=[("a", "b")], **FIVE), StageError, "history"),
    ("tvc", lambda model, clip: model.answer(clip, "what?"), StageError, "assemble caption"),
    ("tvc", lambda model, clip: model.caption(write_wav(clip.with_name("sound.wav"), 1.5, 8_000)), MediaError, "video"),
    ("tvc", lambda model, clip: model.caption(clip.with_name("absent.mp4")), MediaError, "absent.mp4"),
    ("video_words", lambda model, clip: model.caption(clip), StageError, "writes no text"),
)


@pytest.mark.parametrize(("name", "use", "error", "named"), REFUSED)
def test_what_a_model_cannot_do_is_refused(
    name: str, use: Any, error: type[Exception], named: str, model: Any, clip: Path
) -> None:
    with pytest.raises(error, match=named):
        use(model(name), clip)


# -- what the stages measured and drew ---------------------------------------------------------------------------------


def test_only_the_parts_that_learn_have_moved(stages: Any) -> None:
    before = torch.load(checkpoint(stages, "video_words"), weights_only=True)["state_dict"]
    after = torch.load(checkpoint(stages, "avsd"), weights_only=True)["state_dict"]
    moved = {
        name
        for name, value in before.items()
        if not torch.equal(value, after[f"model.tokens.video.{name}"]) and not name.endswith("num_batches_tracked")
    }
    assert "classifier.fc.weight" in moved
    assert not any(name.endswith(("running_mean", "running_var")) for name in moved)


def test_the_figures(stages: Any) -> None:
    media = stages["avsd"] / "media"
    assert {path.name for path in media.iterdir()} == {
        "token_shift.png", "token_shift.csv", "samples.csv", "clip_1.mp4", "clip_2.mp4", "clip_3.mp4",
    }  # fmt: skip
    with (media / "token_shift.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for modality, count in (("video", 8 * 2 * 3), ("audio", 8 * 3)):
        for when in ("before", "after"):
            assert sum(int(row[when]) for row in rows if row["modality"] == modality) == count
    with (media / "samples.csv").open(encoding="utf-8") as file:
        samples = list(csv.DictReader(file))
    assert len(samples) == 8
    assert all(len(row["video tokens before"].split(", ")) == 6 for row in samples)
    assert all(row["question"] and row["original"] for row in samples)


def test_listed_categories_are_the_frequent_and_the_changed_ones() -> None:
    counts = {"a": (9, 0), "b": (0, 7), "c": (5, 6), "d": (1, 1)}
    assert listed_categories(counts, 2) == ["b", "c", "a"]
