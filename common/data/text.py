"""Captions: normalization and tokenizers."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from common.files import environment, parsing, read_bytes
from common.types import NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SIDES: dict[str, str] = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
SIDES |= {right: left for left, right in SIDES.items()}
SIDE_WORD = re.compile(rf"\b({'|'.join(SIDES)})\b")

# Use threads from this many texts on.
MANY_TEXTS = 2000
# Cache the pieces of this many words.
KNOWN_WORDS = 2**16

# Matches words (with digits and underscores), clitics such as "'s", and single punctuation marks.
WORD = re.compile(r"\w+|(?<=\w)'\w+|[^\w\s]")


def normalize_caption(text: str) -> str:
    """Convert a text to lower case and NFKD; drop combining marks, lone surrogates and extra spaces.

    Source: docs/papers/mct.md [8], after VirTex.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    text = unicodedata.normalize("NFKD", text.encode("utf-8", "ignore").decode().lower())
    # Repeat it: some characters only reveal capitals when decomposed, and some lower-case letters decompose again.
    text = unicodedata.normalize("NFKD", text.lower())
    return " ".join("".join(sign for sign in text if not unicodedata.combining(sign)).split())


def swap_left_right(text: str) -> str:
    """Swap the words "left" and "right" for a mirrored image, keeping the case.

    Source: docs/papers/mct.md [8]. VirTex also swaps inside longer words.
    """
    return SIDE_WORD.sub(lambda match: SIDES[match[0]], text)


# -- tokens ------------------------------------------------------------------------------------------------------------


def pad_tokens(rows: Sequence[Sequence[int]], pad_id: int = 0, least: int = 1) -> Tensor:
    """Pad the token ids of a batch at the end: int64 [B, L], with L at least `least`."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    padded = np.full((len(rows), lengths.max(initial=least)), pad_id)
    filled = np.arange(padded.shape[1]) < lengths[:, None]
    padded[filled] = np.fromiter((token for row in rows for token in row), dtype=np.int64)
    return torch.from_numpy(padded)


class VocabularyError(ValueError):
    """A vocabulary cannot be read or learned. The message names the file or the field."""


class CaptionTokenizer(ABC):
    """Converts captions to token ids and back; call `prepare` first. `max_tokens` includes boundary tokens.

    Without a file, `prepare` learns the vocabulary from training captions. Learning is deterministic and takes a
    second.
    """

    #: Name of the constructor's argument for the file.
    field: ClassVar[str] = "vocabulary"
    file_name: ClassVar[str]
    pad_id: int = 0
    start_id: int
    end_id: int
    vocabulary_size: int = 0  # set by `read`

    def __init__(self, file: str | None, max_tokens: PositiveInt) -> None:
        self.file = file
        self.max_tokens = max_tokens
        #: Content of the vocabulary file.
        self.content = b""
        self._vocabulary: Any = None

    def normal_form(self, text: str) -> str:
        return normalize_caption(text)

    def read(self, content: bytes) -> None:
        """Load the content of a vocabulary file. Use this instead of `prepare`."""
        self._read(content)
        self.content = content

    def state(self) -> dict[str, Tensor]:
        """Return a learned vocabulary, which the checkpoint stores because the captions may change later."""
        return {"vocabulary": torch.tensor(list(self.content), dtype=torch.uint8)} if self.file is None else {}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Load the vocabulary from `state`. Return False if `state` has none."""
        if "vocabulary" in state:
            self.read(bytes(state["vocabulary"].tolist()))
        return "vocabulary" in state

    def prepare(self, captions: Iterable[str] = ()) -> None:
        """Read the vocabulary file, or learn a vocabulary from training captions."""
        if self.file is None:
            texts = [self.normal_form(caption) for caption in captions]
            if not any(texts):
                raise VocabularyError(f"{self.field}: there are no captions to learn a vocabulary from")
            self.read(self._learn(texts))
        elif not self.content:
            path = Path(self.file)
            path = path / self.file_name if path.is_dir() else path
            if not path.is_file():
                raise FileNotFoundError(
                    f"data.tokenizer.{self.field}: {path} is not a regular file. Give the released model's (nothing is "
                    "downloaded; `assemble data PAPER` lists it), or null to learn one from training captions"
                )
            with parsing(path, VocabularyError):
                self.read(read_bytes(path))

    def encode(self, text: str) -> list[int]:
        """Return up to `max_tokens` token ids, including both boundary tokens. A cut text keeps its closing token."""
        return [self.start_id, *self._numbers(self.normal_form(text))[: self.max_tokens - 2], self.end_id]

    def excess(self, text: str) -> int:
        """Count the tokens of a text that `encode` cuts off."""
        return max(0, 2 + len(self._numbers(self.normal_form(text))) - self.max_tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without boundary and padding tokens."""
        hidden = {self.pad_id, self.start_id, self.end_id}
        return self._text([int(token) for token in tokens if int(token) not in hidden])

    @abstractmethod
    def _numbers(self, text: str) -> list[int]:
        """Return the token ids of a normalized text, without boundary tokens."""

    def _text(self, tokens: list[int]) -> str:
        return self._vocabulary.decode(tokens)

    @abstractmethod
    def _learn(self, texts: Sequence[str]) -> bytes:
        """Learn a vocabulary from normalized captions and return its file's content."""

    @abstractmethod
    def _read(self, content: bytes) -> None:
        """Load a vocabulary file."""


class WordPieceTokenizer(CaptionTokenizer):
    """BERT's uncased tokenizer: splits words into the longest known pieces, between `[CLS]` and `[SEP]`.

    `vocabulary` is a `vocab.txt`, or the folder of a released BERT. If None, up to `vocabulary_size` pieces are
    learned.

    Source: docs/papers/mct.md [7].
    """

    file_name = "vocab.txt"
    special: ClassVar[tuple[str, ...]] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(
        self, vocabulary: str | None = None, vocabulary_size: PositiveInt = 30522, max_tokens: PositiveInt = 30
    ) -> None:
        super().__init__(vocabulary, max_tokens)
        self.largest_size = vocabulary_size
        self._pieces_of: dict[str, list[int]] = {}

    @property
    def mask_id(self) -> int:
        return self._vocabulary.token_to_id("[MASK]")

    def _numbers(self, text: str) -> list[int]:
        words = text.split(" ")
        if len(self._pieces_of) > KNOWN_WORDS:
            self._pieces_of.clear()
        # No piece spans a space, so cache words: a look-up takes a tenth of the time of splitting.
        self._pieces_of |= {word: self._vocabulary.encode(word).ids for word in words if word not in self._pieces_of}
        return [piece for word in words for piece in self._pieces_of[word]]

    def _learn(self, texts: Sequence[str]) -> bytes:
        from tokenizers.trainers import WordPieceTrainer

        tokenizer = _uncased({token: number for number, token in enumerate(self.special)})
        assert tokenizer.normalizer is not None
        assert tokenizer.pre_tokenizer is not None
        first: set[str] = set()
        later: set[str] = set()
        for run in {run for text in texts for run in text.split()}:
            for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(run)):
                first.update(word)
                later.update(word[1:])
        # List the letters, because the trainer numbers them in random order and breaks ties by number.
        letters = [*self.special, *sorted(first), *(f"##{letter}" for letter in sorted(later))]
        if len(letters) > self.largest_size:
            raise VocabularyError(
                f"vocabulary_size: {self.largest_size} is too small, the captions' {len(first)} different characters "
                f"need {len(letters)}"
            )
        trainer = WordPieceTrainer(vocab_size=self.largest_size, special_tokens=letters, show_progress=False)
        # Without this, the library warns at every later fork of a worker.
        with environment(TOKENIZERS_PARALLELISM="false"):
            tokenizer.train_from_iterator(texts, trainer)
        numbers = tokenizer.get_vocab()
        return "".join(f"{token}\n" for token in sorted(numbers, key=numbers.__getitem__)).encode()

    def _read(self, content: bytes) -> None:
        tokens = content.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
        numbers = {token: number for number, token in enumerate(tokens)}
        if set(self.special) - set(numbers) or numbers["[PAD]"] != self.pad_id:
            raise ValueError(f"expected one piece per line, [PAD] first, including {', '.join(self.special)}")
        self._vocabulary, self._pieces_of = _uncased(numbers), {}
        self.start_id, self.end_id = numbers["[CLS]"], numbers["[SEP]"]
        self.vocabulary_size = len(tokens)


class SentencePieceTokenizer(CaptionTokenizer):
    """VirTex's tokenizer: SentencePiece BPE between `[SOS]` and `[EOS]`; piece 0 is the unknown piece and the padding.

    `model` is a file with the pieces `[SOS]` and `[EOS]`. If None, up to `vocabulary_size` pieces are learned.

    Source: docs/papers/mct.md [11]. Unlike VirTex, long captions keep the closing token.
    """

    field = "model"
    file_name = "captions.model"

    def __init__(
        self, model: str | None = None, vocabulary_size: PositiveInt = 10000, max_tokens: PositiveInt = 30
    ) -> None:
        super().__init__(model, max_tokens)
        self.largest_size = vocabulary_size

    def _numbers(self, text: str) -> list[int]:
        return self._vocabulary.encode(text)

    def _learn(self, texts: Sequence[str]) -> bytes:
        return learn_pieces(
            texts,
            model_type="bpe",
            vocab_size=self.largest_size,
            bos_id=-1,
            eos_id=-1,
            # VirTex uses [MASK] in other tasks; keep it so that ids match released vocabularies.
            control_symbols=["[SOS]", "[EOS]", "[MASK]"],
        )

    def _read(self, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_proto=content)
        start, end = (processor.piece_to_id(piece) for piece in ("[SOS]", "[EOS]"))
        if processor.unk_id() != self.pad_id or self.pad_id in (start, end):
            raise ValueError("a SentencePiece model is expected with <unk> as piece 0 and with pieces [SOS] and [EOS]")
        self._vocabulary = processor
        self.start_id, self.end_id = start, end
        self.vocabulary_size = processor.get_piece_size()


class XLMRTokenizer(CaptionTokenizer):
    """XLM-R's multilingual tokenizer: SentencePiece's pieces between `<s>` and `</s>`.

    Ids are SentencePiece's ids plus one, because of the padding: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, the first
    piece 4, `<mask>` last. Captions keep case and accents but lose trailing spaces. `model` is a released
    `sentencepiece.bpe.model` or the folder of this file. If None, a unigram model of up to `vocabulary_size` pieces is
    learned.

    Source: docs/papers/m3p.md [2].
    """

    field = "model"
    file_name = "sentencepiece.bpe.model"
    start_id = 0
    pad_id = 1
    end_id = 2
    unknown_id = 3

    def __init__(
        self, model: str | None = None, vocabulary_size: PositiveInt = 250002, max_tokens: PositiveInt = 66
    ) -> None:
        super().__init__(model, max_tokens)
        self.largest_size = vocabulary_size

    @property
    def mask_id(self) -> int:
        return self.vocabulary_size - 1

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def normal_form(self, text: str) -> str:
        return text.encode("utf-8", "ignore").decode().rstrip()

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, without boundary tokens and without a length limit. No piece spans a space."""
        normal = [self.normal_form(text) for text in texts]
        # Passing a list always starts threads, which takes longer than tokenizing a few words.
        if len(texts) >= MANY_TEXTS:
            rows = self._vocabulary.encode(normal)
        else:
            rows = [self._vocabulary.encode(text) for text in normal]
        return [[piece + 1 if piece else self.unknown_id for piece in row] for row in rows]

    def _numbers(self, text: str) -> list[int]:
        return self.pieces([text])[0]

    def _text(self, tokens: list[int]) -> str:
        kept = (token for token in tokens if token != self.mask_id)
        return self._vocabulary.decode([token - 1 if token > self.unknown_id else 0 for token in kept])

    def _learn(self, texts: Sequence[str]) -> bytes:
        return learn_pieces(texts, model_type="unigram", vocab_size=self.largest_size - 2)

    def _read(self, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_proto=content)
        if (processor.unk_id(), processor.bos_id(), processor.eos_id()) != (0, 1, 2):
            raise ValueError("a SentencePiece model is expected with <unk>, <s> and </s> as pieces 0, 1 and 2")
        self._vocabulary = processor
        self.vocabulary_size = processor.get_piece_size() + 2


def learn_pieces(texts: Sequence[str], **options: Any) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            hard_vocab_limit=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise VocabularyError(f"vocabulary_size: SentencePiece cannot learn from these captions ({error})") from error
    return model.getvalue()


class WordVocabulary(CaptionTokenizer):
    """VSE++'s tokenizer: whole words and punctuation marks, between `<start>` and `<end>`.

    `vocabulary` is a file with one word per line, special tokens first. If None, the words that occur at least
    `min_count` times are learned, the most frequent first. VSE++ has no `max_tokens`; no COCO caption is long enough to
    be cut.

    Source: docs/papers/mct.md [9]. VSE++ uses NLTK, which splits "don't" into "do" and "n't".
    """

    file_name = "words.txt"
    start_id = 1
    end_id = 2
    special: ClassVar[tuple[str, ...]] = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(
        self,
        vocabulary: str | None = None,
        min_count: NonNegativeInt = 4,
        max_tokens: PositiveInt = 100,
    ) -> None:
        super().__init__(vocabulary, max_tokens)
        self.min_count = min_count

    def _numbers(self, text: str) -> list[int]:
        return [self._vocabulary.get(word, 3) for word in WORD.findall(text)]

    def _text(self, tokens: list[int]) -> str:
        return " ".join(self._words[token] for token in tokens)

    def _learn(self, texts: Sequence[str]) -> bytes:
        counts = Counter(word for text in texts for word in WORD.findall(text))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        words = [word for word in ordered if counts[word] >= self.min_count]
        if not words:
            raise VocabularyError(f"min_count: no word occurs {self.min_count} times in the captions; lower it")
        return "".join(f"{word}\n" for word in (*self.special, *words)).encode()

    def _read(self, content: bytes) -> None:
        words = content.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
        if tuple(words[:4]) != self.special:
            raise ValueError(f"expected one word per line, beginning with {', '.join(self.special)}")
        self._words = words
        self._vocabulary = {word: number for number, word in enumerate(words)}
        self.vocabulary_size = len(words)


def _uncased(numbers: dict[str, int]) -> Tokenizer:
    """Build an uncased BERT tokenizer that adds no boundary tokens. `numbers` maps pieces to ids."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece

    tokenizer = Tokenizer(WordPiece(numbers))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def text_numbers(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Hash each text's tokens without the padding: int64 [B, L] with lengths [B] -> int64 [B]."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    numbers = torch.where(place < lengths.to(tokens.device)[:, None], tokens.long() + 1, 0)
    return (numbers * torch.full_like(place, 6364136223846793005).cumprod(0)).sum(1)
