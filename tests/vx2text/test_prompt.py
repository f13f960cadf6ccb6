"""Test the prompt (order, modality tokens, truncation), and the tokenizers of T5 and the miniature."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import SentencePieceUnigramTokenizer

from common.data.worlds.narrated import COLOURS, DIRECTIONS, PITCHES, SHAPES, TIMBRES, sentences
from papers.vx2text.data import option_targets
from papers.vx2text.prompt import (
    LETTERS,
    Prompt,
    PromptLimits,
    TextSample,
    TextTokenizer,
)

TEXT = [
    "answer the question : continue the dialog : describe the video : video : audio : speech : caption : history :",
    "question : options : (a) (b) (c) (d) (e) what is he doing in the kitchen ?",
    "Sheldon: That is my spot. Leonard: I know, you've told me a hundred times. naïve café",
]


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return TextTokenizer(vocabulary_size=128)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Train a small tokenizer of the same kind as T5's."""
    made = SentencePieceUnigramTokenizer()
    made.train_from_iterator(TEXT * 10, 90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    folder = tmp_path_factory.mktemp("t5")
    made.save(str(folder / "tokenizer.json"))
    return TextTokenizer(str(folder), vocabulary_size=256)


def positions(ids: list[int], wanted: list[int]) -> int:
    """Return the position at which a sequence of ids begins, or -1 if it does not occur."""
    return next((place for place in range(len(ids)) if ids[place : place + len(wanted)] == wanted), -1)


FULL = TextSample(
    "dialog",
    "what color is it ?",
    ("hello i am anna", "hello i am ben"),
    "a circle moves",
    (("what shape is it ?", "it is a circle"), ("who speaks ?", "it is anna")),
    ("red", "green", "blue", "yellow", "white"),
)


# -- order and places --------------------------------------------------------------------------------------------------


def test_the_order_of_the_parts(words: TextTokenizer) -> None:
    ids = Prompt(words, PromptLimits(audio_tokens=2), clips=1, sounds=1).encode(FULL)
    assert words.decode([number for number in ids if number >= 0]) == (
        "continue the dialog : video : audio : speech : hello i am anna hello i am ben caption : a circle moves "
        "history : what shape is it ? it is a circle who speaks ? it is anna question : what color is it ? "
        "options : (a) red (b) green (c) blue (d) yellow (e) white"
    )
    assert [number for number in ids if number < 0] == [-1, -2, -3, -101, -102]
    video = positions(ids, words.encode("video :"))
    assert ids[video + 2 : video + 5] == [-1, -2, -3]
    audio = positions(ids, words.encode("audio :"))
    assert ids[audio + 2 : audio + 4] == [-101, -102]
    assert ids[-1] == words.eos_id
    assert ids.count(words.eos_id) == 1


def test_an_empty_dialogue_has_no_history(words: TextTokenizer) -> None:
    text = words.decode(Prompt(words).encode(TextSample("dialog", "who speaks ?")))
    assert text == "continue the dialog : question : who speaks ?"
    blank = TextSample("dialog", "who speaks ?", speech=("", " "), caption=" ", history=(("", ""),))
    assert words.decode(Prompt(words).encode(blank)) == text


@pytest.mark.parametrize(("limit", "cut"), [(9, False), (8, False), (7, True), (0, False)])
def test_speech_that_does_not_fit_is_counted(words: TextTokenizer, limit: int, cut: bool) -> None:
    assert len(words.encode("hello i am anna")) == 4
    text = TextSample("dialog", "who speaks ?", speech=("hello i am anna", "hello i am ben"))
    assert Prompt(words, PromptLimits(speech=limit)).speech_is_cut(text) == cut


# -- truncation --------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.lists(st.text(max_size=400), max_size=12),
    st.text(max_size=300),
    st.lists(st.tuples(st.text(max_size=80), st.text(max_size=80)), max_size=8),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_question_and_places_survive_any_text(
    pieces: TextTokenizer, speech: list[str], caption: str, history: list[tuple[str, str]], spoken: int, told: int
) -> None:
    limits = PromptLimits(speech=spoken, caption=16, history=told, question=12)
    text = TextSample("dialog", "what is he doing ?", tuple(speech), caption, tuple(history))
    prompt = Prompt(pieces, limits, clips=4, sounds=1)
    ids = prompt.encode(text)
    assert [number for number in ids if number < 0] == [*range(-1, -13, -1), -101, -102, -103]
    question = pieces.encode("question :") + pieces.encode("what is he doing ?")[:12] + [pieces.eos_id]
    assert ids[-len(question) :] == question
    names = sum(len(pieces.encode(name)) for name in ("continue the dialog :", "video :", "audio :", "speech :"))
    names += sum(len(pieces.encode(name)) for name in ("caption :", "history :"))
    assert len(ids) <= names + 15 + spoken + 16 + told + len(question)


def test_speech_is_cut_from_its_start(words: TextTokenizer) -> None:
    lines = tuple(f"hello i am {name}" for name in ("anna", "ben", "carla", "david"))
    text = TextSample("caption", speech=lines)
    kept = words.decode(Prompt(words, PromptLimits(speech=6)).encode(text))
    assert kept == "describe the video : speech : am carla hello i am david"
    assert "anna" in words.decode(Prompt(words, PromptLimits(speech=16)).encode(text))


def test_the_latest_turns_are_kept(words: TextTokenizer) -> None:
    turns = (("what shape is it ?", "it is a circle"), ("who speaks ?", "it is anna"))

    def told(limit: int) -> str:
        text = TextSample("dialog", history=turns)
        return words.decode(Prompt(words, PromptLimits(history=limit)).encode(text)).partition(" history : ")[2]

    assert told(15) == "what shape is it ? it is a circle who speaks ? it is anna"
    # Keep as many of the latest whole turns as fit, or else the end of the latest turn.
    assert told(14) == "who speaks ? it is anna"
    assert told(6) == "who speaks ? it is anna"
    assert told(4) == "? it is anna"


def test_long_questions_and_options_are_cut_at_their_end(words: TextTokenizer) -> None:
    text = TextSample("question", "what color is it ?", options=("red green", "blue", "", "left up", "down"))
    ids = Prompt(words, PromptLimits(question=2, option=1)).encode(text)
    assert words.decode(ids) == (
        "answer the question : question : what color options : (a) red (b) blue (c) (d) left (e) down"
    )
    with pytest.raises(ValueError, match="shorter"):
        Prompt(words).encode(TextSample("question", "who ?", options=("one", "two")))


def test_answers(words: TextTokenizer) -> None:
    prompt = Prompt(words, PromptLimits(answer=4))
    assert prompt.answer("it is red") == [*words.encode("it is red"), 1]
    assert prompt.answer("a red circle moves left") == [*words.encode("a red circle"), 1]
    assert prompt.answer("") == [1]
    options, targets = list("vwxyz"), []
    for place in range(5):
        targets.append(option_targets(prompt, options, place, "label")["labels"])
        assert option_targets(prompt, options, place, "position")["labels"] == [place]
    assert targets == [[letter, 1] for letter in words.letter_ids]
    assert len(set(words.letter_ids)) == 5
    assert option_targets(prompt, options, -1, "label")["labels"] == []


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_the_words_of_the_miniature(words: TextTokenizer) -> None:
    assert (words.pad_id, words.eos_id, words.unknown_id) == (0, 1, 2)
    for word in (*SHAPES, *COLOURS, *DIRECTIONS, *TIMBRES, *PITCHES):
        (number,) = words.encode(word)
        assert words.decode([number]) == word
    for sentence in sentences()[::50]:
        assert words.unknown_id not in words.encode(sentence)
        assert words.decode(words.encode(sentence)) == sentence
    assert words.encode("Red") == words.encode("red")
    assert words.encode("") == []
    assert words.encode("unheard") == [2]
    # A new tokenizer and an unpickled one give the same numbers.
    for other in (TextTokenizer(vocabulary_size=128), pickle.loads(pickle.dumps(words))):
        assert other.encode(sentences()[-40]) == words.encode(sentences()[-40])


def test_the_pieces_of_t5(pieces: TextTokenizer) -> None:
    ids = pieces.encode("what is he doing in the kitchen ?")
    assert min(ids) > 2
    assert pieces.decode(ids) == "what is he doing in the kitchen ?"
    assert pieces.decode([*ids, 1, *ids, 0, 0]) == "what is he doing in the kitchen ?"
    assert pieces.decode([0, *ids, -100, 255, -1]) == "what is he doing in the kitchen ?"
    assert pieces.decode([]) == ""
    # T5 may split a letter into two tokens: the mark of a new word, which all letters share, and the letter.
    assert pieces.letter_ids == tuple(pieces.encode(letter)[-1] for letter in LETTERS)
    assert len(set(pieces.letter_ids)) == 5
