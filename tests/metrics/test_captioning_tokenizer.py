"""Test the tokenizer that needs no Java, on the golden strings and on random texts."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics.captioning.tokenizer import PUNCTUATION, ptb_tokens, tokenize

GOLDEN = Path(__file__).parents[1] / "golden" / "vx2text"
STRINGS = json.loads((GOLDEN / "ptb_tokens.json").read_text())
ITEMS = json.loads((GOLDEN / "caption_metrics.json").read_text())["items"]
LINE_SEPARATORS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("item", STRINGS["items"], ids=lambda item: ascii(item["text"])[:40])
def test_golden_strings(item: dict) -> None:
    assert ptb_tokens(item["text"]) == item["tokens_before_punct"]
    assert tokenize(item["text"]) == item["tokenized"]


def test_golden_captions() -> None:
    assert frozenset(STRINGS["meta"]["punctuation_list"]) == PUNCTUATION
    for item in ITEMS:
        assert tokenize(item["hyp"]) == item["tok"]["coco"]["hyp"]
        assert [tokenize(text) for text in item["refs"]] == item["tok"]["coco"]["refs"]


# Results of the original tokenizer for forms that the golden strings lack.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("call 555 123 4567 now", "call 555\u00a0123\u00a04567 now"),
        ("2 1/2 cups, 1 1/2-inch", "2\u00a01/2 cups 1\u00a01/2 inch"),
        ("plan B. The end, plan B. Note", "plan b the end plan b. note"),
        ("o\u2019clock, don\u2019t", "o\u2019clock do n't"),
        ("a\U0001f600b \U0001f44d", "a b"),
        ("well\u00adknown", "wellknown"),
        ("wait.. what.... yes", "wait what yes"),
        ("rock'n'roll", "rock 'n' roll"),
        ("said 'hello there' 'til", "said hello there 'til"),
        ("the'90s, '90S", "the '90s '90s"),
        ("foo.bar foo!bar foo-bar.baz", "foo.bar foo!bar foo-bar baz"),
        ("a/b/c/d A/B's", "a/b/c / d a/b 's"),
        ("AT&T at&t &amp; &nbsp; &#39;", "at&t at & t & &#39;"),
        ('<p class="x">hi</p> <3 <a b', '<p\u00a0class="x"> hi </p> < 3 < a b'),
        ("sat. Sat. no. no. 5 Inc. a.m.", "sat sat no no. 5 inc. a.m."),
        ("x :) y :P z :Dog", "x :-rrb- y :p z dog"),
        ("-LRB- hi -RRB-", "-lrb- hi -rrb-"),
        ("\u0441\u043b\u043e\u0432\u043e \u4f60\u597d a\u0301b \u0633\u0644\u0627\u0645", None),
    ],
)
def test_other_forms(text: str, expected: str | None) -> None:
    assert tokenize(text) == (text if expected is None else expected)


def test_empty_text() -> None:
    assert ptb_tokens("") == []
    assert tokenize(" \t\u2028 ") == ""
    assert tokenize(". , ! ?") == ""
    assert tokenize("walks".join(LINE_SEPARATORS)).split(" ") == ["walks"] * (len(LINE_SEPARATORS) - 1)


TEXTS = st.text(st.sampled_from(list("aZ09 .,'\"-/!?:;()<>[]{}&@#$%_+=~^*|\\\u00e9\u0301\u2019\u2026\U0001f600\u2028")))


@given(TEXTS | st.text())
@settings(max_examples=200)
def test_any_text_gives_clean_lower_case_tokens(text: str) -> None:
    tokens = ptb_tokens(text)
    assert all(token and not token.startswith(" ") and " " not in token for token in tokens)
    assert not any(len(one) for token in tokens for one in token if one in "\n\r\u2028\u2029\x0b\x0c\x85")
    assert tokens == [token.lower() for token in tokens]
    # The kind of white space between words doesn't matter.
    assert ptb_tokens(f"\u2029{text}\n") == tokens
    assert ptb_tokens(" ".join(text.split())) == tokens


@pytest.mark.parametrize(
    "unit", ["a", "a.", "a.1.", "a@", "<a b='", "<!--", "a'", "don't ", "1 ", "A&", "http://a..", "\u00e9."]
)
def test_long_texts_take_time_in_proportion(unit: str) -> None:
    # Each form starts many times in 100,000 characters. A quadratic search would take minutes.
    began = time.process_time()
    assert len("".join(ptb_tokens(unit * (100_000 // len(unit))))) > 10
    assert time.process_time() - began < 60
