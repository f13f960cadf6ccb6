"""Caption scores of 5,000 items with 5 references of about 10 words, against pycocoevalcap.

Both sides get tokenized text and give scores per item. Process CPU time on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.metrics.captioning import CaptionSet
from common.metrics.captioning.bleu import bleu
from common.metrics.captioning.cider import cider
from common.metrics.captioning.rouge import rouge_l
from tests.benchmarks.speed import compare, in_turns

ITEMS, REFERENCES, VOCABULARY = 5_000, 5, 4_000
#: Most of the time that pycocoevalcap takes.
MOST = {"cider": 0.2, "bleu": 0.6, "rouge_l": 0.2}
Score = Callable[[], Any]


def corpus() -> tuple[list[str], list[list[str]]]:
    """Sentences of Zipfian words; those of one item share about half of them."""
    draw = np.random.default_rng(0)
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    frequency /= frequency.sum()
    topics = draw.choice(VOCABULARY, (ITEMS, 1, 13), p=frequency)
    words = draw.choice(VOCABULARY, (ITEMS, 1 + REFERENCES, 13), p=frequency)
    words = np.where(draw.random(words.shape) < 0.5, topics, words)
    lengths = draw.integers(7, 14, (ITEMS, 1 + REFERENCES))
    texts = [
        [" ".join(f"w{word}" for word in sentence[:length]) for sentence, length in zip(item, item_lengths)]
        for item, item_lengths in zip(words.tolist(), lengths.tolist())
    ]
    return [item[0] for item in texts], [item[1:] for item in texts]


def ours(metric: str, candidates: list[str], references: list[list[str]]) -> Score:
    function: Callable[[CaptionSet], Any] = {"cider": cider, "bleu": bleu, "rouge_l": rouge_l}[metric]
    return lambda: function(CaptionSet(candidates, references))  # a fresh set: nothing is kept from the last round


def theirs(metric: str, candidates: list[str], references: list[list[str]]) -> Score:
    module, name = {
        "cider": ("cider.cider", "Cider"),
        "bleu": ("bleu.bleu", "Bleu"),
        "rouge_l": ("rouge.rouge", "Rouge"),
    }[metric]
    reason = "pycocoevalcap, the other side of the comparison, is not installed (extra `captioning`)"
    scorer = getattr(pytest.importorskip(f"pycocoevalcap.{module}", reason=reason), name)
    options = {"verbose": 0} if metric == "bleu" else {}
    results = {item: [text] for item, text in enumerate(candidates)}
    truths = dict(enumerate(references))
    return lambda: scorer().compute_score(truths, results, **options)


@pytest.mark.parametrize("metric", MOST)
def test_scores_are_faster(metric: str) -> None:
    data = corpus()
    forms = {"ours": ours(metric, *data), "pycocoevalcap": theirs(metric, *data)}
    (mean, items), (their_mean, their_items) = (score() for score in forms.values())
    np.testing.assert_allclose(mean, their_mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(items.T, np.asarray(their_items), rtol=0, atol=1e-9)
    seconds = in_turns(forms, 3)
    what = f"{metric} of 5,000 captions with 5 references"
    compare(what, "pycocoevalcap", seconds["ours"], seconds["pycocoevalcap"]).stays_below(MOST[metric])
