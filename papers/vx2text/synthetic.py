"""Made-up batches of VX2TEXT, for estimates and measurements without data."""

from __future__ import annotations

from typing import Any

import torch

from common.stages.synthetic import unknown_data
from common.training.examples import Draw, Example, batches_of_epoch
from papers.vx2text.data import CaptioningData, DialogData, QuestionAnsweringData, VideoTextData

#: The recipe that stands for the paper where one is measured.
RECIPE = "avsd"
WITHOUT_FILES: dict[str, Any] = {
    "model.text_pretrained": None,
    "model.video_pretrained": None,
    "model.audio_pretrained": None,
    "model.meteor": False,
    "model.audio_classifier.categories": [f"sound {number}" for number in range(527)],  # as many as AudioSet has
}
#: Turns of a dialogue of AVSD.
TURNS = 10
#: Words that name the parts of a prompt, all in all.
NAMES = 24
# Ids of words that every vocabulary has.
_WORDS = (5, 90)


class _Words:
    """Stands for a tokenizer where its vocabulary is a file: every name is one piece."""

    pad_id, eos_id, letter_ids = 0, 1, (5, 6, 7, 8, 9)

    def encode(self, text: str) -> list[int]:
        return [5]


def synthetic(module: Any, data: Any, size: int, draw: Draw) -> Example:
    """Batches as those of a data module, prompts of the greatest length; see `common.stages.synthetic`."""
    if not isinstance(data, VideoTextData):
        raise unknown_data("vx2text", data, (DialogData, QuestionAnsweringData, CaptioningData))
    limits = data.prompt.limits
    places = [*data.prompt.video, *data.prompt.audio]
    options = 5 if isinstance(data, QuestionAnsweringData) else 0
    words = limits.speech + limits.caption + limits.history + limits.question + options * limits.option + NAMES
    ids = draw.integers(*_WORDS, size, len(places) + words)
    ids[:, : len(places)] = torch.tensor(places, dtype=torch.int64)
    short = isinstance(data, QuestionAnsweringData) and data.scoring != "loglik"
    answer = {"label": 2, "position": 1}[data.scoring] if short else limits.answer
    batch: dict[str, Any] = {
        "input_ids": ids,
        "labels": draw.integers(0, 5, size, answer) if short else draw.integers(*_WORDS, size, answer),
        "index": torch.arange(size),
    }
    if data.video is not None:
        side = data.video.crop
        batch["video"] = draw.normal(size, data.video.clips, 3, data.video.frames, side, side)
    if data.audio is not None:
        batch["audio"] = draw.normal(size, 1, data.audio.samples // data.audio.hop + 1, data.audio.mel_bins)
    for name in data.modalities:
        batch[f"{name}_present"] = torch.ones(size, dtype=torch.bool)
        if name in data.categories:
            batch[f"{name}_words"] = draw.integers(0, 4, size, len(data.categories[name])) < 1
    facts = {} if data.tokenizer.pretrained is None else {"tokenizer": _Words()}
    return Example(batch, batches_of_epoch(_items(data), data.batch_size), facts)


def _items(data: VideoTextData) -> int | None:
    count: int | None = data.dataset.published_counts.get(data.train_split)
    turns = TURNS if isinstance(data, DialogData) and data.every_turn else 1
    return None if count is None else count * turns


def prepare(module: Any) -> None:
    """Nothing else is read from files."""
