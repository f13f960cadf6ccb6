"""Captions: normal form, sides, views, back-translations and the three tokenizers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
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

Maker = Callable[..., CaptionTokenizer]
TOKENIZERS: list[Maker] = [
    lambda **k: WordPieceTokenizer(vocabulary_size=120, **k),
    lambda **k: SentencePieceTokenizer(vocabulary_size=120, **k),
    lambda **k: WordVocabulary(**k),
]
every_tokenizer = pytest.mark.parametrize("make", TOKENIZERS, ids=["wordpiece", "sentencepiece", "words"])


def ends(tokenizer: CaptionTokenizer) -> tuple[int, int]:
    first, last = tokenizer.encode("")
    return first, last


# -- normal form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Man  RIDING\ta wave. ", "a man riding a wave."),
        ("Café Ångström", "cafe angstrom"),
        ("one\u2028two\u2029three\x85four\u00a0five\r\nsix", "one two three four five six"),
        ("ﬁne ½", "fine 1⁄2"),
        ("ℌello", "hello"),
        ("İstanbul", "istanbul"),
        ("half \ud83d pair", "half pair"),
        ("", ""),
        ("\u2028", ""),
        ("a 🙂", "a 🙂"),
    ],
)
def test_normal_form(text: str, expected: str) -> None:
    assert normalize_caption(text) == expected


# -- left and right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat left of a dog, right there", "a cat right of a dog, left there"),
        ("bright copyright leftover cleft", "bright copyright leftover cleft"),
        ("a left-hand turn", "a right-hand turn"),
        ("Left, RIGHT", "Right, LEFT"),
        ("", ""),
    ],
)
def test_sides_change_as_whole_words(text: str, expected: str) -> None:
    assert swap_left_right(text) == expected


# -- tokenizers --------------------------------------------------------------------------------------------------------


@every_tokenizer
def test_tokens_stand_between_boundaries(make: Maker) -> None:
    tokenizer = make()
    tokenizer.prepare(CAPTIONS)
    start, end = ends(tokenizer)
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


@every_tokenizer
def test_decoding_gives_the_words_back(make: Maker) -> None:
    tokenizer = make()
    tokenizer.prepare(CAPTIONS)
    text = "a small red star left of a heart"
    tokenizer = pickle.loads(pickle.dumps(tokenizer))  # as it travels to workers
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode(text), 0, 0]) == text
    assert tokenizer.decode(tokenizer.encode("")) == ""
    assert tokenizer.encode(text.upper() + "\u2028") == tokenizer.encode(text)


@every_tokenizer
def test_special_tokens_cannot_be_written_in_a_caption(make: Maker) -> None:
    tokenizer = make()
    tokenizer.prepare(CAPTIONS)
    inner = tokenizer.encode("[SEP] [CLS] [SOS] [EOS] <start> <end>")[1:-1]
    assert not set(ends(tokenizer)) & set(inner)


@every_tokenizer
def test_a_learnt_vocabulary_can_be_given(make: Maker, tmp_path: Path) -> None:
    learnt = make()
    learnt.prepare(CAPTIONS)
    path = tmp_path / "vocabulary"
    path.write_bytes(learnt.content)
    given_file = type(learnt)(str(path))
    given_file.prepare(pytest.fail("captions are not needed") for _ in range(1))
    assert given_file.encode(CAPTIONS[0]) == learnt.encode(CAPTIONS[0])
    # In a folder it has its usual name.
    path.rename(tmp_path / learnt.file_name)
    in_folder = type(learnt)(str(tmp_path))
    in_folder.prepare()
    assert in_folder.encode(CAPTIONS[0]) == learnt.encode(CAPTIONS[0])


@every_tokenizer
def test_errors_name_the_field_and_the_file(make: Maker, tmp_path: Path) -> None:
    tokenizer = make()
    kind = type(tokenizer)
    for captions in ([], ["", "\u2028"]):
        with pytest.raises(ValueError, match=kind.field):
            tokenizer.prepare(captions)
    with pytest.raises(FileNotFoundError, match=rf"{kind.field}: .*nowhere"):
        kind(str(tmp_path / "nowhere")).prepare()
    with pytest.raises(FileNotFoundError, match=kind.file_name):
        kind(str(tmp_path)).prepare()
    for content in (b"", b"\xff\xff\xff", b"a\nb\n"):
        (tmp_path / "wrong").write_bytes(content)
        with pytest.raises(ValueError, match=str(tmp_path / "wrong")):
            kind(str(tmp_path / "wrong")).prepare()


LEARN = """
from tests.data.test_text import CAPTIONS, TOKENIZERS
for make in TOKENIZERS:
    tokenizer = make()
    tokenizer.prepare(CAPTIONS)
    print(tokenizer.content.hex())
"""


def test_learning_gives_the_same_in_every_process() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", LEARN], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    here = [make() for make in TOKENIZERS]
    for tokenizer in here:
        tokenizer.prepare(CAPTIONS)
    assert done.stdout.split() == [tokenizer.content.hex() for tokenizer in here]


def test_word_pieces_agree_with_transformers(tmp_path: Path) -> None:
    from transformers import BertTokenizer

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
    assert ours.encode("a") == [3, 6, 4]


def test_sentence_pieces_are_numbered_as_virtex_does() -> None:
    import sentencepiece

    tokenizer = SentencePieceTokenizer(vocabulary_size=120, max_tokens=5)
    tokenizer.prepare(CAPTIONS)
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
    assert [model.id_to_piece(number) for number in range(4)] == ["<unk>", "[SOS]", "[EOS]", "[MASK]"]
    assert tokenizer.vocabulary_size == 120
    assert tokenizer.encode("a red circle") == [1, *model.encode("a red circle")[:3], 2]
    # An unknown sign is padding, which no loss counts.
    assert 0 in tokenizer.encode("🙂")


def test_words_are_counted_and_ordered() -> None:
    tokenizer = WordVocabulary(min_count=2)
    tokenizer.prepare(["A dog's dog.", "A cat.", "a cat's 'hat'", "bird"])
    words = tokenizer.content.decode().splitlines()
    assert words == ["<pad>", "<start>", "<end>", "<unk>", "a", "'", "'s", ".", "cat", "dog"]
    assert tokenizer.encode("a Bird, a dog.") == [1, 4, 3, 3, 4, 9, 7, 2]
    few = WordVocabulary(min_count=2, max_words=1)
    few.prepare(["A dog's dog.", "A cat."])
    assert few.vocabulary_size == 5


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
    """docs/papers/m3p.md [2]: SentencePiece's numbers plus one, the unknown piece 3, `<mask>` the last."""
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


def test_xlmr_keeps_case_accents_and_limits(xlmr: XLMRTokenizer) -> None:
    assert xlmr.encode("Hund läuft") != xlmr.encode("hund lauft")
    assert xlmr.encode("a dog  \n") == xlmr.encode("a dog")
    long = xlmr.encode("a dog runs " * 9)
    assert len(long) == 12
    assert (long[0], long[-1]) == (0, 2)
    for text in ("ein Hund läuft", "犬 が 走 る", "狗 跑"):
        assert xlmr.decode([0, *xlmr.pieces([text])[0], 2, xlmr.mask_id, xlmr.pad_id]) == text


def test_xlmr_takes_no_other_model(tmp_path: Path) -> None:
    path = tmp_path / "captions.model"
    path.write_bytes(SentencePieceTokenizer(vocabulary_size=60)._learn(["a dog runs and a cat runs"]))
    with pytest.raises(ValueError, match=r"captions\.model"):
        XLMRTokenizer(str(path)).prepare()


@given(words=st.lists(st.text(alphabet="adogruns Hläufběží犬走る狗跑\u3000,!", max_size=6), max_size=6))
@settings(max_examples=60)
def test_xlmr_pieces_of_a_text_are_those_of_its_words(xlmr: XLMRTokenizer, words: list[str]) -> None:
    """Code-switched captions are put together of words whose pieces are known."""
    text = " ".join(words)
    whole = [piece for row in xlmr.pieces(text.split(" ")) for piece in row]
    assert whole == xlmr.pieces([text])[0]
