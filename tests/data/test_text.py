"""Test captions: normalization, sides, views, back-translations and the three tokenizers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.text import (
    CaptionTokenizer,
    SentencePieceTokenizer,
    WordPieceTokenizer,
    WordVocabulary,
    XLMRTokenizer,
    normalize_caption,
    swap_left_right,
    text_numbers,
)

COLOURS = ("red", "blue", "green", "yellow")
THINGS = ("circle", "square", "star", "heart", "arrow")
CAPTIONS = [
    f"A {size} {color} {thing} left of a {other}."
    for size in ("small", "large")
    for color in COLOURS
    for thing in THINGS
    for other in THINGS
]
AWKWARD = [
    "",
    " \t\n",
    "two\u2028lines\u2029three",
    "🙂 a 👩‍👩‍👧 family",
    "红色的圆形",
    "½ naïve İstanbul ﬁ",
    "\ud83d half",
    "\x00nul",
    "'",
]


def learnt(kind: Any) -> CaptionTokenizer:
    tokenizer: CaptionTokenizer = kind() if kind is WordVocabulary else kind(vocabulary_size=120)
    tokenizer.prepare(CAPTIONS)
    return tokenizer


KINDS = (WordPieceTokenizer, SentencePieceTokenizer, WordVocabulary)
tokenizer = pytest.fixture(scope="module", params=KINDS)(lambda request: learnt(request.param))


@pytest.mark.parametrize(
    ("change", "text", "expected"),
    [
        (normalize_caption, "A Man  RIDING\ta wave. ", "a man riding a wave."),
        (normalize_caption, "Café Ångström", "cafe angstrom"),
        (normalize_caption, "one\u2028two\u2029three\x85four\u00a0five\r\nsix", "one two three four five six"),
        (normalize_caption, "ﬁne ½", "fine 1⁄2"),
        (normalize_caption, "ℌello", "hello"),
        (normalize_caption, "İstanbul", "istanbul"),
        (normalize_caption, "half \ud83d pair", "half pair"),
        (normalize_caption, "", ""),
        (normalize_caption, "\u2028", ""),
        (normalize_caption, "a 🙂", "a 🙂"),
        (swap_left_right, "a cat left of a dog, right there", "a cat right of a dog, left there"),
        (swap_left_right, "bright copyright leftover cleft", "bright copyright leftover cleft"),
        (swap_left_right, "a left-hand turn", "a right-hand turn"),
        (swap_left_right, "Left, RIGHT", "Right, LEFT"),
        (swap_left_right, "", ""),
    ],
)
def test_captions_are_changed(change: Callable[[str], str], text: str, expected: str) -> None:
    assert change(text) == expected


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_tokens_stand_between_boundaries(tokenizer: CaptionTokenizer) -> None:
    start, end = tokenizer.encode("")
    assert tokenizer.pad_id == 0 not in (start, end)
    for text in [*CAPTIONS[:5], *AWKWARD, "word " * 10_000, "w" * 10_000]:
        tokens = tokenizer.encode(text)
        assert all(type(token) is int for token in tokens)
        assert (tokens[0], tokens[-1]) == (start, end)
        assert 2 <= len(tokens) <= tokenizer.max_tokens
        assert 0 <= min(tokens) <= max(tokens) < tokenizer.vocabulary_size
        assert start not in tokens[1:]
        assert end not in tokens[:-1]
    assert len(tokenizer.encode("red " * 10_000)) == tokenizer.max_tokens
    assert len(tokenizer.encode("circle " * 10_000)) == tokenizer.max_tokens


def test_decoding_gives_the_words_back(tokenizer: CaptionTokenizer) -> None:
    text = "a small red star left of a heart"
    tokenizer = pickle.loads(pickle.dumps(tokenizer))  # workers get a pickled copy
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode(text), 0, 0]) == text
    assert tokenizer.decode(tokenizer.encode("")) == ""
    assert tokenizer.encode(text.upper() + "\u2028") == tokenizer.encode(text)


def test_special_tokens_cannot_be_written_in_a_caption(tokenizer: CaptionTokenizer) -> None:
    inner = tokenizer.encode("[SEP] [CLS] [SOS] [EOS] <start> <end>")[1:-1]
    assert not set(tokenizer.encode("")) & set(inner)


def test_a_learnt_vocabulary_can_be_given(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    # A folder holds the vocabulary under its usual file name.
    for name, given_path in (("vocabulary", tmp_path / "vocabulary"), (tokenizer.file_name, tmp_path)):
        (tmp_path / name).write_bytes(tokenizer.content)
        again = type(tokenizer)(str(given_path))  # type: ignore[call-arg]
        again.prepare(pytest.fail("captions are not needed") for _ in range(1))
        assert again.encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])


def test_errors_name_the_field_and_the_file(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    kind: Any = type(tokenizer)
    for captions in ([], ["", "\u2028"]):
        with pytest.raises(ValueError, match=kind.field):
            kind().prepare(captions)
    with pytest.raises(FileNotFoundError, match=rf"{kind.field}: .*nowhere"):
        kind(str(tmp_path / "nowhere")).prepare()
    with pytest.raises(FileNotFoundError, match=kind.file_name):
        kind(str(tmp_path)).prepare()
    for content in (b"", b"\xff\xff\xff", b"a\nb\n", b"[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n"):
        (tmp_path / "wrong").write_bytes(content)
        with pytest.raises(ValueError, match=str(tmp_path / "wrong")):
            kind(str(tmp_path / "wrong")).prepare()


LEARN = """
from tests.data.test_text import KINDS, learnt
for kind in KINDS:
    print(learnt(kind).content.hex())
"""


def test_learning_gives_the_same_in_every_process() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", LEARN], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [learnt(kind).content.hex() for kind in KINDS]


def test_pieces_are_learnt_from_what_is_frequent() -> None:
    words = WordPieceTokenizer(vocabulary_size=12)
    words.prepare(["ab ab abc"] * 3)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert words.content.decode().split() == [*special, "a", "b", "c", "##b", "##c", "ab", "abc"]
    assert words.mask_id == 4
    WordPieceTokenizer(vocabulary_size=10).prepare(["ab ab abc"])
    with pytest.raises(ValueError, match="vocabulary_size"):
        WordPieceTokenizer(vocabulary_size=9).prepare(["ab ab abc"])
    sentences = SentencePieceTokenizer(vocabulary_size=14)
    sentences.prepare(["ab ab abc"] * 3)
    pieces = [sentences._vocabulary.id_to_piece(number) for number in range(sentences.vocabulary_size)]
    special = ["<unk>", "[SOS]", "[EOS]", "[MASK]"]
    assert pieces == [*special, "ab", "▁ab", "▁abc", "bc", "▁a", "abc", "a", "b", "▁", "c"]
    # An unknown character becomes padding, which the losses ignore.
    assert sentences.encode("ab abc 🙂") == [1, 5, 6, 12, 0, 2]


def test_texts_have_a_number_of_64_bits() -> None:
    """Compute a text's hash: a polynomial of its token numbers plus one, modulo 2^64. Padding doesn't change it."""
    base, tokens = 6364136223846793005, torch.tensor([[5, 7, 9], [5, 3, 0]], dtype=torch.int32)
    found = [number % 2**64 for number in text_numbers(tokens, torch.tensor([2, 1])).tolist()]
    assert found == [(6 * base + 8 * base**2) % 2**64, 6 * base % 2**64]


def test_word_pieces_agree_with_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertTokenizer

    monkeypatch.setattr("common.data.text.KNOWN_WORDS", 3)
    pieces = [
        "[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a!,.红的", "##s", "star", "##fish", "cafe", "don",
        "'", "t",
    ]  # fmt: skip
    path = tmp_path / "vocab.txt"
    path.write_text("\r\n".join(pieces) + "\r\n", encoding="utf-8", newline="")
    ours = WordPieceTokenizer(str(tmp_path), max_tokens=12)
    ours.prepare()
    theirs = BertTokenizer({piece: number for number, piece in enumerate(pieces)})
    assert ours.vocabulary_size == len(pieces)
    for text in ["A starfish!", "stars, café", "红的a红", "Don't \u2028 star🙂", "a" * 200, "star " * 40, "", "starx"]:
        expected = theirs(normalize_caption(text), truncation=True, max_length=12)["input_ids"]
        assert ours.encode(text) == expected
        assert len(ours._pieces_of) < 10
    assert ours.encode("a") == [3, 6, 4]


def test_words_are_counted_and_ordered() -> None:
    tokenizer = WordVocabulary(min_count=2)
    tokenizer.prepare(["A dog's dog.", "A cat.", "a cat's 'hat'", "bird"])
    words = tokenizer.content.decode().splitlines()
    assert words == ["<pad>", "<start>", "<end>", "<unk>", "a", "'", "'s", ".", "cat", "dog"]
    assert tokenizer.encode("a Bird, a dog.") == [1, 4, 3, 3, 4, 9, 7, 2]


# -- XLM-R -------------------------------------------------------------------------------------------------------------

MULTILINGUAL = (
    "a dog runs", "ein Hund läuft", "un chien court", "pes běží, rychle!", "犬 が 走 る", "狗 跑", "ひらがなとカタカナ",
    "ice cream",
)  # fmt: skip


@pytest.fixture(scope="module")
def xlmr() -> XLMRTokenizer:
    tokenizer = XLMRTokenizer(vocabulary_size=120, max_tokens=12)
    tokenizer.prepare(MULTILINGUAL)
    return tokenizer


def test_xlmr_numbers(xlmr: XLMRTokenizer) -> None:
    """Compare the numbers with docs/papers/m3p.md [2]: SentencePiece's plus one, 3 for unknown, and `<mask>` last."""
    processor = xlmr._vocabulary
    assert xlmr.vocabulary_size == processor.get_piece_size() + 2
    assert xlmr.mask_id == processor.get_piece_size() + 1
    assert (xlmr.start_id, xlmr.pad_id, xlmr.end_id, xlmr.unknown_id) == (0, 1, 2, 3)
    for text in MULTILINGUAL:
        expected = [piece + 1 for piece in processor.encode(text)]
        assert min(expected) > 3
        assert xlmr.pieces([text]) == [expected]
        assert xlmr.encode(text) == [0, *expected[:10], 2]
    assert 3 in xlmr.pieces(["Ω"])[0]
    assert xlmr.encode("") == [0, 2]
    assert xlmr.pieces([]) == []
    assert xlmr.decode([0, 3, 2]) == " ⁇ "
    small = XLMRTokenizer(vocabulary_size=34)
    small.prepare(MULTILINGUAL[:4])
    assert small.vocabulary_size == 34


def test_xlmr_keeps_case_accents_and_limits(xlmr: XLMRTokenizer) -> None:
    assert xlmr.encode("Hund läuft") != xlmr.encode("hund lauft")
    assert xlmr.encode("a dog  \n") == xlmr.encode("a dog")
    long = xlmr.encode("a dog runs " * 9)
    assert len(long) == 12
    assert (long[0], long[-1]) == (0, 2)
    for text in ("ein Hund läuft", "犬 が 走 る", "狗 跑"):
        assert xlmr.decode([0, *xlmr.pieces([text])[0], 2, xlmr.mask_id, xlmr.pad_id]) == text


def test_a_model_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "captions.model"
    for made, read in ((SentencePieceTokenizer, XLMRTokenizer), (XLMRTokenizer, SentencePieceTokenizer)):
        path.write_bytes(made(vocabulary_size=60)._learn(["a dog runs and a cat runs"]))
        with pytest.raises(ValueError, match=r"captions\.model"):
            read(str(path)).prepare()


@given(words=st.lists(st.text(alphabet="adogruns Hläufběží犬走る狗跑\u3000,!", max_size=6), max_size=6))
@settings(max_examples=60)
def test_xlmr_pieces_of_a_text_are_those_of_its_words(xlmr: XLMRTokenizer, words: list[str]) -> None:
    """Code-switching builds captions from single words, so a text must have the same pieces as its words."""
    text = " ".join(words)
    whole = [piece for row in xlmr.pieces(text.split(" ")) for piece in row]
    assert whole == xlmr.pieces([text])[0]
