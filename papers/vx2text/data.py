"""Questions, dialogues and descriptions of clips for VX2TEXT; the miniature writes TVQA's, AVSD's and TVC's layouts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from common.data.datasets.avsd import AVSD, Dialog
from common.data.datasets.tvc import TVC, Moment
from common.data.datasets.tvqa import TVQA, Question, Subtitle
from common.data.item_dataset import ItemDataset, Sample, Steps
from common.data.listing import Listing
from common.data.media import Limits
from common.data.text import pad_tokens
from common.data.worlds.base import World
from common.data.worlds.narrated import kind_of
from common.training.data_module import ShardedDataModule
from common.training.examples import Draw, batches_of_epoch
from common.training.examples import Example as ExampleBatch
from common.types import Fraction, PositiveInt
from papers.vx2text.clips import (
    DEFAULT_AUDIO,
    DEFAULT_VIDEO,
    MODALITIES,
    AudioInput,
    ClipReader,
    Modality,
    VideoInput,
    made_up_clips,
)
from papers.vx2text.loss import IGNORED
from papers.vx2text.miniature import KnownWords
from papers.vx2text.prompt import DEFAULT_LIMITS, LETTERS, Prompt, PromptLimits, PromptText, TextTokenizer

#: For made-up prompts: word ids that every vocabulary has, and the number of words that name parts of a prompt.
MADE_UP_IDS, WORDS_OF_PROMPT = (5, 90), 24

#: Answer to a question with options: the letter of one; its text, by likelihood; or its position, for a model without a
#: decoder.
Scoring = Literal["label", "loglik", "position"]
#: Subtitles by clip.
Speech = Mapping[str, Sequence[Subtitle]]


# -- texts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Example:
    """The text of one sample.

    Args:
        answer: the model's target; None if withheld.
        correct: position of the right option; -1 without options or if withheld.
        references: texts to compare the output with, starting with the original answer if it is one.
    """

    text: PromptText
    answer: str | None
    correct: int
    references: tuple[str, ...]
    clip: str


#: From a position in the listing to its example.
MakeExample = Callable[[int], Example]


def question_example(questions: Sequence[Question], subtitles: Speech, position: int) -> Example:
    """A question with options and the speech of the whole clip."""
    question = questions[position]
    text = PromptText("question", question.text, spoken(subtitles, question.clip), options=question.options)
    answer = question.options[question.answer] if question.answer >= 0 else None
    return Example(text, answer, question.answer, () if answer is None else (answer,), question.clip)


def dialog_example(
    dialogs: Sequence[Dialog], subtitles: Speech, with_summary: bool, rows: npt.NDArray[np.int64], position: int
) -> Example:
    """A turn of a dialogue with its history; `with_summary` appends the video's summary to its caption.

    `rows` [N, 2] are dialogue and turn of each position.
    """
    number, turn = rows[position].tolist()
    dialog = dialogs[number]
    asked = dialog.turns[turn]
    history = tuple((earlier.question, earlier.answer or "") for earlier in dialog.turns[:turn])
    caption = f"{dialog.caption} {dialog.summary}".strip() if with_summary else dialog.caption
    speech = spoken(subtitles, dialog.video)
    text = PromptText("dialog", asked.question, speech, caption=caption, history=history)
    references: tuple[str, ...] = () if asked.answer is None else (asked.answer,)
    if dialog.references and turn == len(dialog.turns) - 1:
        references = tuple(sorted(dialog.references, key=lambda text: text != asked.answer))
    return Example(text, asked.answer, -1, references, dialog.video)


def caption_example(
    moments: Sequence[Moment], subtitles: Speech, rows: npt.NDArray[np.int64], position: int
) -> Example:
    """A description of a moment with the speech in it; `rows` [N, 2] are moment and description of each position."""
    number, place = rows[position].tolist()
    moment = moments[number]
    texts = tuple(description.text for description in moment.descriptions)
    text = PromptText("caption", speech=spoken(subtitles, moment.clip, moment.span))
    return Example(text, texts[place] if texts else None, -1, texts, moment.clip)


def spoken(subtitles: Speech, clip: str, span: Limits | None = None) -> tuple[str, ...]:
    return tuple(line.text for line in subtitles.get(clip, ()) if span is None or line.overlaps(span))


class VideoTextItems(ItemDataset):
    """Clips with their questions and answers, as input of `collate`; `example` makes those of a position.

    Args:
        reader: None puts true words in the places of modality tokens instead.
        replaced: share of true words to replace with other words of the modality.
    """

    def __init__(
        self,
        listing: Listing,
        example: MakeExample,
        prompt: Prompt,
        reader: ClipReader | None,
        known: KnownWords,
        scoring: Scoring = "label",
        replaced: float = 0.15,
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.example = example
        self.prompt = prompt
        self.reader = reader
        self.known = known
        self.scoring: Scoring = scoring
        self.replaced = replaced

    def _make(self, file: int, rng: np.random.Generator) -> Steps:
        example = self.example(file)
        sample: Sample = {}
        if self.reader is not None:
            sample |= yield from self.reader.steps(self.listing[file], rng)
            ids = self.prompt.encode(example.text)
        else:
            places = (len(self.prompt.video), len(self.prompt.audio))
            ids = self.prompt.encode(example.text, *self.known.noisy(example.clip, places, self.replaced, rng))
        if self.prompt.limits.speech:
            sample["speech_cut"] = torch.tensor(self.prompt.speech_is_cut(example.text))
        sample |= {
            "input_ids": ids,
            "labels": self._labels(example),
            "correct": torch.tensor(example.correct),
            "question_text": example.text.question,
            # Real data have no kinds, even if a question has the same words.
            "kind": kind_of(example.text.question) if self.known.words else "",
            "answer_text": example.answer or "",
            "references": list(example.references),
            **self.known.marks(example.clip),
        }
        if example.text.options:
            sample["options"] = list(example.text.options)
            sample |= option_targets(self.prompt, example.text.options, self.scoring)
        return sample

    def _labels(self, example: Example) -> list[int]:
        if example.answer is None:
            return []
        if example.text.options and self.scoring == "label":
            return self.prompt.letter(example.correct)
        if example.text.options and self.scoring == "position":
            return [example.correct]
        return self.prompt.answer(example.answer)

    def fill_cache(self) -> None:
        if self.reader is not None:
            self.reader.fill_cache(self.listing)

    def preview(self, item: int) -> npt.NDArray[np.uint8]:
        assert self.reader is not None
        return self.reader.preview(self.listing[item])


def prompt_for(
    tokenizer: TextTokenizer, limits: PromptLimits, video: VideoInput | None, audio: AudioInput | None
) -> Prompt:
    """A writer of prompts with places for the tokens of each clip and the sound."""
    video_places = 0 if video is None else video.clips * limits.video_tokens
    return Prompt(tokenizer, limits, video_places, 0 if audio is None else limits.audio_tokens)


def option_targets(prompt: Prompt, options: Sequence[str], scoring: Scoring) -> Sample:
    if scoring == "label":
        return {"answer_options": torch.tensor(prompt.tokenizer.letter_ids)}
    if scoring == "position":
        return {"answer_options": torch.arange(len(options))}
    return {"option_labels": [prompt.answer(option) for option in options]}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Make a batch of samples.

    Returns:
        `video` float32 [B, S, 3, T, H, W] and `video_present` bool [B], `audio` float32 [B, 1, frames, mel_bins] and
        `audio_present` bool [B], if the samples have them; `input_ids` int64 [B, N], padded with 0 at the end, negative
        in the places of modality tokens; `speech_cut` bool [B], whether speech is cut, if there is any; `labels` int64
        [B, M], -100 for padding; `video_words` and `audio_words` bool [B, C], the true categories, if known;
        `answer_options` int64 [B, 5] or `option_labels` int64 [B, 5, M'] for options; `correct`, `index`, `label`
        and `skipped` int64 [B]; lists of length B: `question_text`, `kind` of the question (""
        except in the miniature), `answer_text` ("" if withheld), and lists of texts in `references` and `options`.
    """
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        column = [sample[name] for sample in samples]
        if name == "input_ids":
            batch[name] = pad_tokens(column, TextTokenizer.pad_id)
        elif name == "labels":
            batch[name] = pad_tokens(column, IGNORED)
        elif name == "option_labels":
            flat = pad_tokens([row for own in column for row in own], IGNORED)
            batch[name] = flat.view(len(column), -1, flat.shape[1])
        else:
            batch[name] = torch.stack(column) if isinstance(first, Tensor) else column
    return batch


# -- data modules ------------------------------------------------------------------------------------------------------


class VideoTextData(ShardedDataModule):
    """Shared base of the data modules of the three tasks.

    Args:
        tokenizer: of the language model.
        video_categories, audio_categories: of the classifiers, in their order, to mark the known true categories of
            clips.
        prompt: maximum pieces of each part of the text, and tokens per clip.
        slots: `media` reads the clips; `words` puts their true categories in the places of tokens, with some wrong
            ones, to pre-train the language model on text alone ([14], step 2).
        test_batch_size: samples per evaluation step, per device.
        dataset, world, batch_size, max_skipped_fraction, kwargs: see ShardedDataModule.

    Attributes:
        options: of a question.
        rows_per_item: training samples of each published item.
    """

    options: ClassVar[int] = 0
    rows_per_item = 1
    scoring: Scoring = "label"

    def __init__(
        self,
        dataset: TVQA | TVC | AVSD,
        tokenizer: TextTokenizer,
        world: World | None = None,
        modalities: Sequence[Modality] = MODALITIES,
        video: VideoInput = DEFAULT_VIDEO,
        audio: AudioInput = DEFAULT_AUDIO,
        video_categories: Sequence[str] | None = None,
        audio_categories: Sequence[str] | None = None,
        prompt: PromptLimits = DEFAULT_LIMITS,
        slots: Literal["media", "words"] = "media",
        replaced: Fraction = 0.15,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        batch_size: PositiveInt = 64,
        test_batch_size: PositiveInt = 16,
        max_skipped_fraction: Fraction = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, world, batch_size=batch_size, max_skipped_fraction=max_skipped_fraction, **kwargs)
        if "audio" in modalities and "audio" not in dataset.streams:
            raise ValueError(
                f"data.modalities: {dataset.title} is distributed without sound; leave audio out, here and in "
                "model.modalities"
            )
        self.tokenizer = tokenizer
        self.modalities = tuple(modalities)
        self.video = video if "video" in modalities else None
        self.audio = audio if "audio" in modalities else None
        named = {"video": video_categories, "audio": audio_categories}
        self.categories: dict[Modality, Sequence[str]] = {
            name: names for name in self.modalities if (names := named[name]) is not None
        }
        self.slots = slots
        self.replaced = replaced
        self.train_split = train_split
        self.validation_split = validation_split
        self.test_split = test_split
        self.test_batch_size = test_batch_size
        self.prompt = prompt_for(tokenizer, prompt, self.video, self.audio)

    def setup(self, stage: str) -> None:
        self.dataset.listing(self.test_split)  # missing test files fail before training

    @abstractmethod
    def examples(self, split: str, training: bool) -> tuple[Listing, MakeExample]:
        """Listing of a split with one file per example, and what makes the example of a file."""

    def subtitles(self) -> Speech:
        return (self.dataset.subtitles() if self.prompt.limits.speech else None) or {}

    def items(self, split: str, training: bool) -> VideoTextItems:
        listing, example = self.examples(split, training)
        reader = None
        if self.slots == "media":
            reader = ClipReader(self.video, self.audio, training, self.cache_bytes)
        return VideoTextItems(
            listing,
            example,
            self.prompt,
            reader,
            KnownWords(self.dataset.words(), self.categories),
            self.scoring,
            self.replaced,
            seed=self.seed,
            max_skipped_fraction=self.max_skipped_fraction,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.items(self.train_split, training=True), collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Any]:
        items = self.items(self.validation_split, training=False)
        return self.evaluation_loader(items, self.test_batch_size, "validation", collate_fn=collate)

    def test_dataloader(self) -> DataLoader[Any]:
        items = self.items(self.test_split, training=False)
        return self.evaluation_loader(items, self.test_batch_size, collate_fn=collate)

    # -- without data --------------------------------------------------------------------------------------------------

    def example_batch(self, module: Any, size: int, draw: Draw) -> ExampleBatch:
        limits = self.prompt.limits
        places = [*self.prompt.video, *self.prompt.audio]
        words = limits.speech + limits.caption + limits.history + limits.question + self.options * limits.option
        ids = draw.integers(*MADE_UP_IDS, size, len(places) + words + WORDS_OF_PROMPT)
        ids[:, : len(places)] = torch.tensor(places, dtype=torch.int64)
        short = self.options > 0 and self.scoring != "loglik"
        answer = {"label": 2, "position": 1}[self.scoring] if short else limits.answer
        batch: dict[str, Any] = {
            "input_ids": ids,
            "labels": draw.integers(*((0, self.options) if short else MADE_UP_IDS), size, answer),
            "index": torch.arange(size),
            **made_up_clips(self.video, self.audio, size, draw),
        }
        for name in self.modalities:
            batch[f"{name}_present"] = torch.ones(size, dtype=torch.bool)
        # Without the vocabulary file, every text is one piece.
        any_tokenizer = SimpleNamespace(encode=lambda text: [5])
        facts = {} if self.tokenizer.pretrained is None else {"tokenizer": any_tokenizer}
        items = self.dataset.published_counts.get(self.train_split)
        return ExampleBatch(batch, batches_of_epoch(items and items * self.rows_per_item, self.batch_size), facts)


def _warn_unless(found: bool, what: str) -> None:
    if not found:
        rank_zero_warn(f"the test split has no {what}, so metrics of them are left out; see `assemble data vx2text`")


class QuestionAnsweringData(VideoTextData):
    """TVQA: questions with five options ([7] and [10]). The answers of its test split are withheld; test on `val`.

    Scoring `label` generates the letter of an option, `loglik` scores the text of each option, and `position` picks an
    option without a decoder.
    """

    options = len(LETTERS)

    def __init__(
        self,
        dataset: TVQA,
        tokenizer: TextTokenizer,
        scoring: Scoring = "label",
        modalities: Sequence[Modality] = ("video",),
        test_split: str = "val",
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, modalities=modalities, test_split=test_split, **kwargs)
        self.scoring = scoring

    def setup(self, stage: str) -> None:
        super().setup(stage)
        _warn_unless(any(one.answer >= 0 for one in self.dataset.questions(self.test_split)), "answers")

    def examples(self, split: str, training: bool) -> tuple[Listing, MakeExample]:
        example = partial(question_example, self.dataset.questions(split), self.subtitles())
        return self.dataset.listing(split), example


class DialogData(VideoTextData):
    """AVSD: turns of dialogues; only the last turn of each in the test split ([10]).

    Args:
        with_summary: append the summary of a video to its caption; `prompt.caption: 0` leaves out both.
        every_turn: train on all turns of each dialogue; recipes record it.
    """

    rows_per_item = 10  # turns of a dialogue

    def __init__(
        self,
        dataset: AVSD,
        tokenizer: TextTokenizer,
        with_summary: bool = False,
        every_turn: Literal[True] = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        if with_summary and not self.prompt.limits.caption:
            raise ValueError("data.with_summary needs a caption in the prompt: set data.prompt.caption, such as to 128")
        self.with_summary = with_summary

    def setup(self, stage: str) -> None:
        super().setup(stage)
        dialogs = self.dataset.dialogs(self.test_split)
        _warn_unless(any(dialog.turns and dialog.turns[-1].answer for dialog in dialogs), "answers")
        _warn_unless(any(dialog.references for dialog in dialogs), "six references")

    def examples(self, split: str, training: bool) -> tuple[Listing, MakeExample]:
        dialogs = self.dataset.dialogs(split)
        pairs = [
            (number, turn)
            for number, dialog in enumerate(dialogs)
            for turn in range(len(dialog.turns) - 1 if split == self.test_split else 0, len(dialog.turns))
            if not training or dialog.turns[turn].answer is not None
        ]
        rows = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        example = partial(dialog_example, dialogs, self.subtitles(), self.with_summary, rows)
        return self.dataset.listing(split).subset(rows[:, 0]), example


class CaptioningData(VideoTextData):
    """TVC: descriptions of moments ([10]), one per training sample; `val` has all of a moment as references."""

    rows_per_item = 2

    def __init__(
        self,
        dataset: TVC,
        tokenizer: TextTokenizer,
        modalities: Sequence[Modality] = ("video",),
        test_split: str = "val",
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, modalities=modalities, test_split=test_split, **kwargs)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        _warn_unless(any(one.descriptions for one in self.dataset.moments(self.test_split)), "descriptions")

    def examples(self, split: str, training: bool) -> tuple[Listing, MakeExample]:
        moments = self.dataset.moments(split)
        pairs = [
            (number, place)
            for number, moment in enumerate(moments)
            for place in (range(len(moment.descriptions)) if training else [0])
        ]
        rows = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        example = partial(caption_example, moments, self.subtitles(), rows)
        return self.dataset.listing(split).subset(rows[:, 0]), example
