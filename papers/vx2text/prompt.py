"""Builds the language model's prompts: the words of a sample in a fixed order, with places for modality tokens.

All wording, order and limits are defined here; the model only replaces reserved ids with embeddings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from common.data.text import VocabularyError
from common.files import parsing
from common.types import NonNegativeInt, PositiveInt

Modality = Literal["video", "audio"]
MODALITIES: tuple[Modality, ...] = ("video", "audio")
#: Reserved ids: token j of the video is -1 - j, and token j of the audio is -101 - j.
PLACES: dict[Modality, int] = {"video": -1, "audio": -101}

Task = Literal["question", "dialog", "caption"]
#: First words of each task's prompt.
TASK_WORDS: dict[Task, str] = {
    "question": "answer the question :",
    "dialog": "continue the dialog :",
    "caption": "describe the video :",
}
PARTS = ("video", "audio", "speech", "caption", "history", "question", "options")
LETTERS = ("a", "b", "c", "d", "e")

VOCABULARY = "tokenizer.json"
#: Cache the ids of this many texts, because questions, speech and the words of prompts recur.
CACHED_TEXTS = 2**14


class TextTokenizer:
    """Splits text into word pieces with T5's numbering: 0 is padding, 1 ends a text, 2 is unknown.

    Args:
        pretrained: T5 folder with a `tokenizer.json`; None builds a vocabulary of whole words from the narrated
            miniature, whose texts are the same for every seed.
        vocabulary_size: rows of the language model's embedding. T5 has more rows than pieces.

    Source: [5] and [6].
    """

    pad_id = 0
    eos_id = 1
    unknown_id = 2

    def __init__(self, pretrained: str | None = None, vocabulary_size: PositiveInt = 32128) -> None:
        self.pretrained = pretrained
        self.vocabulary_size = vocabulary_size
        self._ids: dict[str, list[int]] = {}

    @cached_property
    def content(self) -> bytes:
        """The vocabulary file's content. An export overwrites this attribute."""
        if self.pretrained is None:
            from common.data.worlds.narrated import sentences

            words = [*TASK_WORDS.values(), *(f"{part} :" for part in PARTS), *(f"({letter})" for letter in LETTERS)]
            return word_vocabulary([*sentences(), *LETTERS, *words])
        path = Path(self.pretrained) / VOCABULARY
        if not path.is_file():
            raise FileNotFoundError(
                f"data.tokenizer.pretrained: {path} does not exist; put T5's files there (nothing is downloaded)"
            )
        return path.read_bytes()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without an end token. Drops lone surrogates, which no vocabulary accepts."""
        if text not in self._ids:
            if len(self._ids) >= CACHED_TEXTS:
                self._ids.clear()
            plain = " ".join(text.encode("utf-8", "ignore").decode().split())
            self._ids[text] = self._pieces.encode(plain, add_special_tokens=False).ids
        return self._ids[text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the first end token. Skip padding, modality tokens and ids without a piece."""
        text = takewhile(lambda piece: piece != self.eos_id, ids)
        return self._pieces.decode([piece for piece in text if self.pad_id < piece < self._pieces.get_vocab_size()])

    @cached_property
    def letter_ids(self) -> tuple[int, ...]:
        """The ids of the option letters a to e. Use a letter's last piece, since T5 may put a word start mark first."""
        return tuple(self.encode(letter)[-1] for letter in LETTERS)

    @cached_property
    def _pieces(self) -> Tokenizer:
        content = self.content
        with parsing(Path(self.pretrained or "") / VOCABULARY, VocabularyError):
            pieces = Tokenizer.from_buffer(content)
        pieces.no_truncation()  # the file of `save_pretrained` also stores limits of earlier calls
        pieces.no_padding()
        special = [pieces.token_to_id(token) for token in ("<pad>", "</s>")]
        if special != [self.pad_id, self.eos_id] or pieces.get_vocab_size() > self.vocabulary_size:
            raise ValueError(
                f"data.tokenizer: {self.pretrained} is not a T5 vocabulary: its first pieces must be <pad> and </s>, "
                f"and it may have at most vocabulary_size ({self.vocabulary_size}) pieces"
            )
        return pieces


def word_vocabulary(lines: Sequence[str]) -> bytes:
    """Build a `tokenizer.json` from the lower-case words of the lines, the most frequent first."""
    counts = Counter(word for line in lines for word in line.casefold().split())
    # Write unknown words as SentencePiece does.
    words = ["<pad>", "</s>", "\u2047", *sorted(counts, key=lambda word: (-counts[word], word))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[2]))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made.to_str().encode()


# -- the prompt --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptLimits:
    """Maximum pieces of each part. 0 removes a part, except for the question and the answer.

    Attributes:
        speech: subtitles; the earliest are cut. T5 was trained on 512 pieces.
        caption: a given description of the video.
        history: earlier questions and answers. Keeps the latest turns that fit, or the end of the last turn.
        answer: includes the end token.
        video_tokens, audio_tokens: K, the tokens per clip.

    Source: [5].
    """

    speech: NonNegativeInt = 256
    caption: NonNegativeInt = 128
    history: NonNegativeInt = 256
    question: PositiveInt = 48
    option: NonNegativeInt = 40
    answer: PositiveInt = 30
    video_tokens: NonNegativeInt = 3
    audio_tokens: NonNegativeInt = 3


DEFAULT_LIMITS = PromptLimits()


@dataclass(frozen=True, slots=True)
class TextSample:
    """The text of one sample. Empty parts don't appear in the prompt.

    Attributes:
        answer: the model's target; None if the data set withholds answers.
        references: texts to compare the output with. If the original answer is one of them, it is first.
        correct: position of the right option; -1 without options or if the data set withholds answers.
        kind: kind of the question; only in the miniature.
    """

    task: Task
    question: str = ""
    speech: tuple[str, ...] = ()
    caption: str = ""
    history: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()
    answer: str | None = None
    references: tuple[str, ...] = ()
    correct: int = -1
    kind: str = ""


class Prompt:
    """Writes prompts: task, video, audio, speech, caption, history, question, options.

    Each part starts with its name; T5 needs no other separator. Each part of text is cut separately, so a long speech
    removes neither the question nor modality tokens. Each of the `clips` and `sounds` has one place per token.

    Source: [5].
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        limits: PromptLimits = DEFAULT_LIMITS,
        clips: int = 0,
        sounds: int = 0,
    ) -> None:
        video_places = clips * limits.video_tokens
        if video_places > (most := PLACES["video"] - PLACES["audio"]):
            raise ValueError(
                f"data.prompt.video_tokens times data.video.clips must be at most {most}, not {video_places}"
            )
        self.tokenizer = tokenizer
        self.limits = limits
        self.video = [PLACES["video"] - token for token in range(video_places)]
        self.audio = [PLACES["audio"] - token for token in range(sounds * limits.audio_tokens)]

    def encode(self, text: TextSample, words: Sequence[Sequence[str]] | None = None) -> list[int]:
        """Return a prompt's ids with an end token. `words` of video and audio replace the modality tokens, if given."""
        limits, encode = self.limits, self.tokenizer.encode
        video, audio = (self.video, self.audio) if words is None else map(self._joined, words)
        options: list[int] = []
        if text.options and limits.option:
            for letter, option in zip(LETTERS, text.options, strict=True):
                options += [*encode(f"({letter})"), *encode(option)[: limits.option]]
        speech = self._joined(text.speech)
        contents = (
            video,
            audio,
            speech[max(len(speech) - limits.speech, 0) :],
            encode(text.caption)[: limits.caption],
            self._history(text.history),
            encode(text.question)[: limits.question],
            options,
        )
        ids = [*encode(TASK_WORDS[text.task])]
        for part, content in zip(PARTS, contents):
            if content:
                ids += [*encode(f"{part} :"), *content]
        return [*ids, self.tokenizer.eos_id]

    def speech_is_cut(self, text: TextSample) -> bool:
        return len(self._joined(text.speech)) > self.limits.speech > 0

    def answer(self, text: str) -> list[int]:
        """Return the ids of the target text with an end token."""
        return [*self.tokenizer.encode(text)[: self.limits.answer - 1], self.tokenizer.eos_id]

    def _joined(self, texts: Sequence[str]) -> list[int]:
        return [piece for text in texts for piece in self.tokenizer.encode(text)]

    def _history(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        limit = self.limits.history
        kept: list[int] = []
        for question, answer in reversed(turns if limit else ()):
            turn = [*self.tokenizer.encode(question), *self.tokenizer.encode(answer)]
            if len(turn) + len(kept) > limit:
                # Keep the end of a turn that is too long, which is its most informative part.
                return kept or turn[-limit:]
            kept = [*turn, *kept]
        return kept
