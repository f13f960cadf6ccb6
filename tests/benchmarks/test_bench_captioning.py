"""Caption scores of 5,000 items with 5 references of about 10 words, against pycocoevalcap.

Run with `pytest tests/benchmarks/test_bench_captioning.py --benchmark-only`. Both sides get tokenized text and give
scores per item. Process CPU time on one thread. `test_scores_are_faster` takes the two in turns and asserts the ratio
of their medians: five times for CIDEr; BLEU and ROUGE-L at least as fast. Of the tokenizer only the time is shown.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.metrics.captioning import CaptionSet, tokenize
from common.metrics.captioning.bleu import bleu
from common.metrics.captioning.cider import cider
from common.metrics.captioning.rouge import rouge_l

ITEMS, REFERENCES, VOCABULARY = 5_000, 5, 4_000
LEAST_RATIO = {"cider": 5.0, "bleu": 1.0, "rouge_l": 1.0}
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


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("form", [theirs, ours], ids=["pycocoevalcap", "ours"])
@pytest.mark.parametrize("metric", LEAST_RATIO)
def test_score(benchmark: Any, metric: str, form: Callable[..., Score]) -> None:
    benchmark.group = f"captions, {metric}"
    benchmark.pedantic(form(metric, *corpus()), rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(timer=time.process_time)
def test_tokenize(benchmark: Any) -> None:
    candidates, references = corpus()
    texts = [f"{text.capitalize()} , isn't it?" for item in (candidates, *zip(*references)) for text in item]
    benchmark.group = "captions, tokenizer"
    benchmark.pedantic(lambda: [tokenize(text) for text in texts], rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("metric", LEAST_RATIO)
def test_scores_are_faster(benchmark: Any, metric: str) -> None:
    data = corpus()
    forms = {"pycocoevalcap": theirs(metric, *data), "ours": ours(metric, *data)}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    results: dict[str, Any] = {}

    def compare() -> None:
        for round_ in range(4):
            for name, score in forms.items():
                start = time.process_time()
                results[name] = score()
                if round_:
                    seconds[name].append(time.process_time() - start)

    benchmark.pedantic(compare, rounds=1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["pycocoevalcap"] / medians["ours"]
    benchmark.extra_info.update({f"{name}_ms": round(1000 * median, 1) for name, median in medians.items()})
    benchmark.extra_info["ratio"] = round(ratio, 2)
    print(f"\n{metric}: {benchmark.extra_info}")
    mean, items = results["ours"]
    their_mean, their_items = results["pycocoevalcap"]
    np.testing.assert_allclose(mean, their_mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(items.T, np.asarray(their_items), rtol=0, atol=1e-9)
    assert ratio > LEAST_RATIO[metric]
