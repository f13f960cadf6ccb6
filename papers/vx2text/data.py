"""Data of VX2TEXT: questions, dialogues and descriptions of clips (TVQA, AVSD, TVC) as prompts and answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.data.clips import ClipDataset
from common.data.datasets.avsd import AVSD, Dialog
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA, Question, Subtitle
from common.data.item_dataset import Item, Sample
from common.data.listing import Listing
from common.data.media import Limits
from common.data.sequences import Packed
from common.data.text import pad_tokens
from common.data.worlds.base import World
from common.data.worlds.narrated import kind_of
from common.training.data_module import ShardedDataModule
from common.training.examples import Example as ExampleBatch
from common.training.examples import RandomTensors, batches_of_epoch
from common.types import Fraction, PositiveInt
from papers.vx2text.clips import DEFAULT_AUDIO, DEFAULT_VIDEO, AudioInput, ClipReader, VideoInput, made_up_clips
from papers.vx2text.loss import IGNORED
from papers.vx2text.prompt import (
    DEFAULT_LIMITS,
    LETTERS,
    Modality,
    Prompt,
    PromptLimits,
    TextSample,
    TextTokenizer,
)
from papers.vx2text.true_words import TrueWords

#: For random prompts: the range of word ids, which every vocabulary has, and the number of words that name the parts.
MADE_UP_IDS, WORDS_OF_PROMPT = (5, 90), 24

#: How to answer a question with options: generate the letter, compare the likelihoods of the texts, or classify the
#: position without a decoder.
Scoring = Literal["label", "loglik", "position"]


class VideoTextItems(ClipDataset):
    """Clips with their questions and answers, for `collate`.

    Args:
        examples: text samples, one for each file in the listing.
        source: reads the clips, or draws words that replace the clips' tokens.
    """

    def __init__(
        self,
        listing: Listing,
        examples: Iterable[TextSample],
        prompt: Prompt,
        source: ClipReader | TrueWords,
        scoring: Scoring = "label",
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.examples = Packed(examples)
        self.prompt = prompt
        self.source = source
        self.scoring: Scoring = scoring

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        example, clip = self.examples[item.file], self.listing[item.file]
        sample = self.source.read(clip, rng)
        if self.prompt.limits.speech:
            sample["speech_cut"] = torch.tensor(self.prompt.speech_is_cut(example))
        sample |= {
            "input_ids": self.prompt.encode(example, sample.pop("words", None)),
            "labels": [] if example.answer is None else self.prompt.answer(example.answer),
            "correct": torch.tensor(example.correct),
            "clip": clip.path.stem,
            "question_text": example.question,
            "kind": example.kind,
            "answer_text": example.answer or "",
            "references": list(example.references),
        }
        if example.options:
            sample["options"] = example.options
            sample |= option_targets(self.prompt, example.options, example.correct, self.scoring)
        return sample

    def transform(self, batch: list[Sample]) -> None:
        self.source.transform(batch)


def option_targets(prompt: Prompt, options: Sequence[str], correct: int, scoring: Scoring) -> Sample:
    """Return the `labels` of the right option, empty if `correct` is -1, and the labels of all options.

    The latter are `option_labels` for scoring `loglik`, else `answer_options`.
    """
    if scoring == "loglik":
        labels = [prompt.answer(option) for option in options]
        return {"labels": labels[correct] if correct >= 0 else [], "option_labels": labels}
    if scoring == "label":
        numbers, end = prompt.tokenizer.letter_ids, [prompt.tokenizer.eos_id]
    else:
        numbers, end = tuple(range(len(options))), []
    return {"labels": [numbers[correct], *end] if correct >= 0 else [], "answer_options": torch.tensor(numbers)}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Make a batch of samples.

    Returns:
        Only if the samples have them: `video` float32 [B, S, 3, T, H, W] and `video_present` bool [B], `audio` float32
        [B, 1, 1, frames, mel_bins] and `audio_present` bool [B], and `speech_cut` bool [B], whether speech is cut.
        `input_ids` int64 [B, N], padded with 0, negative in the places of modality tokens. `labels` int64 [B, M],
        padded with -100. For options, `answer_options` int64 [B, 5] or `option_labels` int64 [B, 5, M']. `correct`,
        `index`, `label` and `skipped` int64 [B]. Lists of length B: `clip`, `question_text`, `kind`, `answer_text` (""
        if withheld), `references` and `options`.
    """
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        column = [sample[name] for sample in samples]
        if name == "input_ids":
            batch[name] = pad_tokens(column, TextTokenizer.pad_id)
        elif name == "labels":
            batch[name] = pad_tokens(column, IGNORED)
        elif name == "option_labels":
            flat = pad_tokens([labels for options in column for labels in options], IGNORED)
            batch[name] = flat.view(len(column), -1, flat.shape[1])
        else:
            batch[name] = torch.stack(column) if isinstance(first, Tensor) else column
    return batch


# -- data modules ------------------------------------------------------------------------------------------------------


class VideoTextData(ShardedDataModule):
    """Base of the data modules of the three tasks.

    Args:
        tokenizer: the language model's tokenizer.
        modalities: modalities to read; None takes the data set's.
        video_categories, audio_categories: the classifiers' categories in order, to check tokens in the miniature.
        prompt: maximum pieces of each part of the text, and tokens per clip.
        slots: `media` reads the clips; `words` replaces tokens with the clip's true categories and some wrong ones, to
            pre-train the language model on text alone ([14], step 2).
        test_batch_size: samples per evaluation step, per device.
        dataset, world, batch_size, max_skipped_fraction, kwargs: see ShardedDataModule.

    Attributes:
        options: number of options per question.
        rows_per_item: training samples per item, to estimate the length of an epoch.
        test_split: the split to measure; "val" if the data set withholds the answers of "test".
    """

    options = 0
    rows_per_item = 1
    test_split = "test"
    scoring: Scoring = "label"

    def __init__(
        self,
        dataset: TVQA | TVC | AVSD,
        tokenizer: TextTokenizer,
        world: World | None = None,
        modalities: Sequence[Modality] | None = None,
        video: VideoInput = DEFAULT_VIDEO,
        audio: AudioInput = DEFAULT_AUDIO,
        video_categories: Sequence[str] | None = None,
        audio_categories: Sequence[str] | None = None,
        prompt: PromptLimits = DEFAULT_LIMITS,
        slots: Literal["media", "words"] = "media",
        replaced: Fraction = 0.15,
        batch_size: PositiveInt = 64,
        test_batch_size: PositiveInt = 16,
        max_skipped_fraction: Fraction = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, world, batch_size=batch_size, max_skipped_fraction=max_skipped_fraction, **kwargs)
        self.modalities = dataset.streams if modalities is None else tuple(modalities)
        if "audio" in self.modalities and "audio" not in dataset.streams:
            raise ValueError(
                f"data.modalities: {dataset.title} is distributed without sound; leave audio out, here and in "
                "model.modalities"
            )
        self.tokenizer = tokenizer
        self.video = video if "video" in self.modalities else None
        self.audio = audio if "audio" in self.modalities else None
        self.categories: dict[Modality, Sequence[str] | None] = {"video": video_categories, "audio": audio_categories}
        self.slots = slots
        self.replaced = replaced
        self.test_batch_size = test_batch_size
        self.prompt = Prompt(
            tokenizer, prompt, 0 if self.video is None else self.video.clips, int(self.audio is not None)
        )

    def setup(self, stage: str) -> None:
        self.dataset.listing(self.test_split)  # fail before training if test files are missing

    @abstractmethod
    def examples(self, split: str, training: bool) -> tuple[Listing, Iterable[TextSample]]:
        """Return the listing of a split, with one file per example, and the examples."""

    @cached_property
    def subtitles(self) -> Mapping[str, Sequence[Subtitle]]:
        return (self.dataset.subtitles() if self.prompt.limits.speech else None) or {}

    def spoken(self, clip: str, span: Limits | None = None) -> tuple[str, ...]:
        """Return the speech in a clip, or only in a span of the clip."""
        return tuple(line.text for line in self.subtitles.get(clip, ()) if span is None or line.overlaps(span))

    def items(self, split: str, training: bool) -> VideoTextItems:
        source: ClipReader | TrueWords
        if self.slots == "words":
            places = len(self.prompt.video), len(self.prompt.audio)
            source = TrueWords(self.dataset.words(), places, self.replaced)
        else:
            source = ClipReader(self.video, self.audio, training, self.cache_bytes)
        listing, examples = self.examples(split, training)
        return VideoTextItems(listing, examples, self.prompt, source, self.scoring, **self.item_options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.items("train", training=True), collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Any]:
        items = self.items("validation", training=False)
        return self.evaluation_loader(items, self.test_batch_size, "validation", collate_fn=collate)

    def test_dataloader(self) -> DataLoader[Any]:
        items = self.items(self.test_split, training=False)
        return self.evaluation_loader(items, self.test_batch_size, collate_fn=collate)

    # -- without data --------------------------------------------------------------------------------------------------

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> ExampleBatch:
        limits, places = self.prompt.limits, [*self.prompt.video, *self.prompt.audio]
        words = limits.speech + limits.caption + limits.history + limits.question + self.options * limits.option
        ids = draw.integers(*MADE_UP_IDS, size, len(places) + words + WORDS_OF_PROMPT)
        ids[:, : len(places)] = torch.tensor(places, dtype=torch.int64)
        answer = {"label": 2, "position": 1}.get(self.scoring, limits.answer) if self.options else limits.answer
        batch: dict[str, Any] = {
            "input_ids": ids,
            "labels": draw.integers(0, len(LETTERS), size, answer),
            "index": torch.arange(size),
            **made_up_clips(self.video, self.audio, size, draw),
        }
        # The vocabulary file isn't read here, so every text becomes one piece.
        any_tokenizer = SimpleNamespace(encode=lambda text: [5])
        facts = {} if self.tokenizer.pretrained is None else {"tokenizer": any_tokenizer}
        items = self.dataset.published_counts.get("train")
        return ExampleBatch(batch, batches_of_epoch(items and items * self.rows_per_item, self.batch_size), facts)


class QuestionAnsweringData(VideoTextData):
    """TVQA: questions with five options ([7] and [10]).

    Scoring `label` generates the letter of an option, `loglik` scores the text of each option, and `position` picks an
    option without a decoder.
    """

    options = len(LETTERS)
    test_split = "val"

    def __init__(self, dataset: TVQA, tokenizer: TextTokenizer, scoring: Scoring = "label", **kwargs: Any) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        self.scoring = scoring

    def examples(self, split: str, training: bool) -> tuple[Listing, Iterable[TextSample]]:
        return self.dataset.listing(split), map(self._example, self.dataset.questions(split))

    def _example(self, question: Question) -> TextSample:
        """Make the sample of a question with options and the speech of the whole clip."""
        answer = None if question.answer < 0 else question.options[question.answer]
        return TextSample(
            "question",
            question.text,
            self.spoken(question.clip),
            options=question.options,
            answer=answer,
            references=() if answer is None else (answer,),
            correct=question.answer,
        )


class DialogData(VideoTextData):
    """AVSD: turns of dialogues. The test split uses only the last turn of each dialogue ([10]).

    Args:
        with_summary: whether to append the video's summary to its caption. `prompt.caption: 0` removes both texts.
        every_turn: always true, to train on all turns of each dialogue.
    """

    rows_per_item = 10  # turns per dialogue

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

    def examples(self, split: str, training: bool) -> tuple[Listing, Iterable[TextSample]]:
        rows: list[int] = []
        examples: list[TextSample] = []
        for row, dialog in enumerate(self.dataset.dialogs(split)):
            first = len(dialog.turns) - 1 if split == self.test_split else 0
            for turn in range(first, len(dialog.turns)):
                if not training or dialog.turns[turn].answer is not None:
                    rows.append(row)
                    examples.append(self._example(dialog, turn))
        return self.dataset.listing(split).subset(rows), examples

    def _example(self, dialog: Dialog, turn: int) -> TextSample:
        """Make the sample of a turn, with the earlier turns as history."""
        question, answer = dialog.turns[turn].question, dialog.turns[turn].answer
        history = tuple((earlier.question, earlier.answer or "") for earlier in dialog.turns[:turn])
        caption = f"{dialog.caption} {dialog.summary}".strip() if self.with_summary else dialog.caption
        references: tuple[str, ...] = () if answer is None else (answer,)
        if dialog.references and turn == len(dialog.turns) - 1:
            references = tuple(sorted(dialog.references, key=lambda reference: reference != answer))
        # Only made-up questions have kinds; a real question may happen to have the same words.
        kind = "" if self.world is None else kind_of(question)
        speech = self.spoken(dialog.video)
        return TextSample("dialog", question, speech, caption, history, (), answer, references, kind=kind)


class CaptioningData(VideoTextData):
    """TVC: descriptions of moments ([10]). In training, each description is a sample; in `val`, each moment is one."""

    rows_per_item = 2
    test_split = "val"

    def __init__(self, dataset: TVC, tokenizer: TextTokenizer, **kwargs: Any) -> None:
        super().__init__(dataset, tokenizer, **kwargs)

    def examples(self, split: str, training: bool) -> tuple[Listing, Iterable[TextSample]]:
        rows: list[int] = []
        examples: list[TextSample] = []
        for row, moment in enumerate(self.dataset.moments(split)):
            speech = self.spoken(moment.clip, moment.span)
            references = tuple(description.text for description in moment.descriptions)
            for answer in references if training else references[:1] or (None,):
                rows.append(row)
                examples.append(TextSample("caption", "", speech, answer=answer, references=references))
        return self.dataset.listing(split).subset(rows), examples
