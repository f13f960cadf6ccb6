"""Test code-switching: rates of the released code, punctuation, capitals, entries, and wrong dictionaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from papers.m3p.code_switching import CodeSwitcher, read_dictionary
from tests.m3p.tiny import four_errors, values

GOLDEN = values("masking_and_codeswitch_stats")
TRANSLATIONS: dict[str, dict[str, list[str]]] = GOLDEN["dictionary_used"]["en"]
TARGETS = ("de", "fr", "ja", "zh")
CAPTIONS = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the dictionary that was used to measure the released functions, one file per language."""
    folder = tmp_path_factory.mktemp("dictionaries")
    for target in TARGETS:
        lines = [f"{word}\t{text}" for word, languages in TRANSLATIONS.items() for text in languages.get(target, [])]
        (folder / f"en-{target}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def switcher(folder: Path, targets: Sequence[str] = TARGETS, **options: Any) -> CodeSwitcher:
    switcher = CodeSwitcher(str(folder), targets, **options)
    switcher.prepare()
    return switcher


@pytest.mark.parametrize("name", ["clag_sent0.8_word0.8", "clag_sent1.0_word1.0", "clag_sent0.5_word0.3"])
def test_every_word_has_the_rates_of_the_released_code(folder: Path, name: str) -> None:
    golden = GOLDEN[name]
    sentence, word = (float(part[4:]) for part in name.split("_")[1:])
    rng = np.random.default_rng(5)
    switch = switcher(folder, sentence_ratio=sentence, word_ratio=word).switch
    reds: Counter[str] = Counter()
    unchanged = 0
    for _ in range(CAPTIONS):
        text = switch("a red dog", rng)
        reds[text.split(" ")[1]] += 1
        unchanged += text == "a red dog"
    expected = sentence * word
    switched = 1 - reds.pop("red", 0) / CAPTIONS
    assert switched == pytest.approx(golden["expected"], abs=four_errors(expected, CAPTIONS) + 1e-12)
    assert switched == pytest.approx(golden["word_switched_rate"], abs=1.5 * four_errors(expected, CAPTIONS) + 1e-12)
    # The dictionary has two words of this caption.
    rate = 1 - sentence + sentence * (1 - word) ** 2
    assert unchanged / CAPTIONS == pytest.approx(rate, abs=four_errors(rate, CAPTIONS) + 1e-12)
    assert rate == pytest.approx(golden["expected_unchanged"], abs=1e-9)
    shares = {"rouge": 1 / 3, "红": 1 / 3, "赤": 1 / 6, "赤い": 1 / 6}
    assert reds.keys() == shares.keys() == golden["share_per_target"].keys()
    total = sum(reds.values())
    assert chisquare([reds[text] for text in shares], [share * total for share in shares.values()]).pvalue > 1e-3


def test_one_word_has_the_rates_of_the_released_code(folder: Path) -> None:
    golden = GOLDEN["dclag_sent0.8"]
    rng = np.random.default_rng(5)
    switch = switcher(folder, mode="one_word", word_ratio=0.0).switch
    found = Counter(switch("a red dog", rng) for _ in range(CAPTIONS))
    assert found.keys() == golden.keys()
    exact = {
        "a red dog": 0.2, "a red Hund": 0.2, "a red chien": 0.1, "a red toutou": 0.1,
        "a rouge dog": 0.4 / 3, "a 红 dog": 0.4 / 3, "a 赤 dog": 0.4 / 6, "a 赤い dog": 0.4 / 6,
    }  # fmt: skip
    for text, rate in exact.items():
        assert golden[text] == pytest.approx(rate, abs=0.015)
    assert chisquare([found[text] for text in exact], [rate * CAPTIONS for rate in exact.values()]).pvalue > 1e-3


def test_marks_and_capitals(folder: Path) -> None:
    options: dict[str, Any] = {"sentence_ratio": 1.0, "word_ratio": 1.0}
    cat = switcher(folder, ["de"], **options)
    rng = np.random.default_rng(0)
    assert cat.switch('The cat, a "CAT" (cat)! concat', rng) == 'The Katze, a "Katze" (Katze)! concat'
    exact = switcher(folder, ["de"], **options, strip_punctuation=False, lower_case=False)
    assert exact.switch("cat, Cat cat", rng) == "cat, Cat Katze"
    assert cat.switch("", rng) == ""
    assert cat.switch("cat  cat ", rng) == "Katze  Katze "


@given(
    text=st.text(alphabet=" aredogct,.!", max_size=40), sentence=st.floats(0, 1), word=st.floats(0, 1),
    mode=st.sampled_from(["every_word", "one_word"]), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=80)
def test_a_switched_caption_differs_in_known_words_alone(
    folder: Path, text: str, sentence: float, word: float, mode: Any, seed: int
) -> None:
    switch = switcher(folder, mode=mode, sentence_ratio=sentence, word_ratio=word).switch
    switched = switch(text, np.random.default_rng(seed))
    assert switched == switch(text, np.random.default_rng(seed))
    before, after = text.split(" "), switched.split(" ")
    assert len(before) == len(after)
    changed = [(old, new) for old, new in zip(before, after) if old != new]
    for old, new in changed:
        entry = TRANSLATIONS[old.strip(",.!").lower()]
        assert new.strip(",.!") in {text for texts in entry.values() for text in texts}
    if mode == "one_word":
        assert len(changed) <= 1
        known = any(old.strip(",.!").lower() in TRANSLATIONS for old in before)
        assert len(changed) == int(known and np.random.default_rng(seed).random() < sentence)


def test_coverage(folder: Path) -> None:
    found = switcher(folder).coverage(["A red dog.", "the dog & the cat", "Red, red"])
    assert (found["samples"], found["covered"]) == (9, 0.6667)
    assert found["covered_by_language"] == {"de": 0.3333, "fr": 0.5556, "ja": 0.3333, "zh": 0.3333}
    empty = switcher(folder).coverage(["", "&"])
    assert (empty["samples"], empty["covered"]) == (0, 0.0)


def test_forms_of_a_dictionary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read MUSE's files with blanks, FreeDict's with tabs, and translations of several words."""
    content = "\ufeffdog Hund\r\nice cream\tdas  Eis\ncat\tKatze\ncat\tKater\n\nnothing\nhot dog\t\n \tx\n"
    (tmp_path / "en-de.txt").write_text(content, encoding="utf-8")
    assert read_dictionary(tmp_path / "en-de.txt") == [
        ("dog", "Hund"), ("ice cream", "das Eis"), ("cat", "Katze"), ("cat", "Kater"),
    ]  # fmt: skip
    assert "3 lines without a translation" in caplog.text


def test_without_names_all_dictionaries_that_are_there_are_taken(folder: Path, tmp_path: Path) -> None:
    everything = switcher(folder, ())
    assert everything.targets == tuple(sorted(TARGETS))
    for part in ("en-de.0-5000.txt", "en-de.5000-6500.txt"):  # MUSE splits a dictionary into these files
        (folder / part).write_text("dog\tHund\n", encoding="utf-8")
    assert switcher(folder, ()).targets == everything.targets
    named = switcher(folder, sorted(TARGETS))
    texts = [everything.switch("a dog and a cat", np.random.default_rng(n)) for n in range(20)]
    assert texts == [named.switch("a dog and a cat", np.random.default_rng(n)) for n in range(20)]
    with pytest.raises(FileNotFoundError, match=r"holds no dictionary en-<language>\.txt.*code_switching to null"):
        CodeSwitcher(str(tmp_path)).prepare()
