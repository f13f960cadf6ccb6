"""Caption scores: golden numbers of coco-caption, plain re-computations of the definitions, edge cases."""

import json
import logging
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics.captioning import METRICS, CaptionScores, CaptionSet, JavaUnavailable, score_captions, scoring
from common.metrics.captioning.bleu import bleu
from common.metrics.captioning.cider import cider
from common.metrics.captioning.meteor import meteor
from common.metrics.captioning.protocols import preparation
from common.metrics.captioning.rouge import rouge_l

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vx2text" / "caption_metrics.json").read_text())
ITEMS = GOLDEN["items"]
PROTOCOLS = ["coco", "tvc", "avsd_1ref", "avsd7", "avsd8"]
WITHOUT_JAVA = [metric for metric in METRICS if metric != "meteor"]


def score(candidates: dict, references: dict, *args: object, **options: object) -> CaptionScores:
    return score_captions(candidates, references, *args, with_meteor=False, **options)  # type: ignore[arg-type]


# Golden numbers


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_scores_from_raw_text(protocol: str) -> None:
    scores = score({i["id"]: i["hyp"] for i in ITEMS}, {i["id"]: i["refs"] for i in ITEMS}, protocol)
    assert scores.ids == tuple(item["id"] for item in ITEMS)
    for metric in WITHOUT_JAVA:
        assert scores.corpus[metric] == pytest.approx(GOLDEN["corpus"][protocol][metric], abs=1e-9)
        if protocol in ITEMS[0]["scores"]:
            golden = [item["scores"][protocol][metric] for item in ITEMS]
            np.testing.assert_allclose(scores.items[metric], golden, rtol=0, atol=1e-9)


def test_golden_scores_from_golden_tokens() -> None:
    tokens = [item["tok"]["coco"] for item in ITEMS]
    captions = CaptionSet([one["hyp"] for one in tokens], [one["refs"] for one in tokens])
    corpus, items = bleu(captions)
    results = {f"bleu_{order}": (corpus[order - 1], items[:, order - 1]) for order in range(1, 5)}
    results |= {"rouge_l": rouge_l(captions), "cider": cider(captions)}
    assert set(results) == set(WITHOUT_JAVA)
    for metric, (mean, per_item) in results.items():
        assert mean == pytest.approx(GOLDEN["corpus"]["coco"][metric], abs=1e-9)
        golden = [item["scores"]["coco"][metric] for item in ITEMS]
        # Relative as well: a score of 1e-16 that should be 1e-8 must not pass for small.
        np.testing.assert_allclose(per_item, golden, rtol=1e-9, atol=1e-15 if metric == "cider" else 0)


@pytest.mark.parametrize("protocol", ["avsd_1ref", "avsd8"])
def test_golden_word_filters(protocol: str) -> None:
    prepare, _ = preparation(protocol)  # type: ignore[arg-type]
    assert [prepare(item["hyp"]) for item in ITEMS] == [item["filtered_hyp"][protocol] for item in ITEMS]


# Protocols


def test_protocols_treat_the_sides_as_stated() -> None:
    text = "caf\u00e9 , a man \u2014 i see 2 ."
    sides = {name: tuple(prepare(text) for prepare in preparation(name)) for name in PROTOCOLS}  # type: ignore[arg-type]
    assert sides == {
        "coco": (text, text),
        "tvc": ("caf  , a man   i see 2 .", "caf  , a man   i see 2 ."),
        "avsd_1ref": ("caf\u00e9 man see", "caf\u00e9 man see"),
        "avsd7": ("caf\u00e9 man see", text),
        "avsd8": ("caf\u00e9 a man \u2014 i see 2", text),
    }


# Against the definitions, written down in the plainest way


def grams(text: str, order: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def plain_bleu(candidates: list[str], references: list[list[str]]) -> list[float]:
    matches, totals, length, closest = [0] * 4, [0] * 4, 0, 0
    for candidate, texts in zip(candidates, references):
        own = len(candidate.split())
        length += own
        closest += min((abs(len(text.split()) - own), len(text.split())) for text in texts)[1]
        for order in range(1, 5):
            for gram, count in grams(candidate, order).items():
                matches[order - 1] += min(count, max(grams(text, order)[gram] for text in texts))
                totals[order - 1] += count
    ratio, product, scores = (length + 1e-15) / (closest + 1e-9), 1.0, []
    for order in range(4):
        product *= (matches[order] + 1e-15) / (totals[order] + 1e-9)
        scores.append(product ** (1 / (order + 1)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1))
    return scores


def plain_cider(candidates: list[str], references: list[list[str]]) -> list[float]:
    def weights(text: str, order: int) -> dict:
        found = {}
        for gram, count in grams(text, order).items():
            frequency = sum(any(gram in grams(other, order) for other in texts) for texts in references)
            found[gram] = count * (math.log(len(candidates)) - math.log(max(frequency, 1)))
        return found

    scores = []
    for candidate, texts in zip(candidates, references):
        total = 0.0
        for text in texts:
            for order in range(1, 5):
                ours, theirs = weights(candidate, order), weights(text, order)
                norm = math.sqrt(sum(v * v for v in ours.values()) * sum(v * v for v in theirs.values()))
                dot = sum(min(ours[g], theirs[g]) * theirs[g] for g in ours if g in theirs)
                bigrams = sum(grams(candidate, 2).values()) - sum(grams(text, 2).values())
                total += (dot / norm if norm else 0) * math.exp(-(bigrams**2) / (2 * 6.0**2))
        scores.append(10 * total / 4 / len(texts))
    return scores


def plain_common(first: list[str], second: list[str]) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


SENTENCE = st.lists(st.sampled_from("abcde"), max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4)), min_size=1, max_size=6)


@given(CORPUS)
@settings(max_examples=60)
def test_bleu_and_cider_follow_their_definitions(corpus: list[tuple[str, list[str]]]) -> None:
    candidates, references = [one for one, _ in corpus], [texts for _, texts in corpus]
    captions = CaptionSet(candidates, references)
    total, items = bleu(captions)
    np.testing.assert_allclose(total, plain_bleu(candidates, references), rtol=1e-9, atol=1e-300)
    for item, (candidate, texts) in enumerate(corpus):
        np.testing.assert_allclose(items[item], plain_bleu([candidate], [texts]), rtol=1e-9, atol=1e-300)
    mean, scores = cider(captions)
    np.testing.assert_allclose(scores, plain_cider(candidates, references), rtol=1e-9, atol=1e-12)
    assert mean == pytest.approx(scores.mean(), abs=1e-12)


@given(CORPUS)
@settings(max_examples=60)
def test_rouge_takes_the_best_precision_and_recall_apart(corpus: list[tuple[str, list[str]]]) -> None:
    mean, scores = rouge_l(CaptionSet([one for one, _ in corpus], [texts for _, texts in corpus]))
    expected = []
    for candidate, texts in corpus:
        words, others = candidate.split(" "), [text.split(" ") for text in texts]
        precision = max(plain_common(words, other) / len(words) for other in others)
        recall = max(plain_common(words, other) / len(other) for other in others)
        both = recall + 1.44 * precision
        expected.append(2.44 * precision * recall / both if both else 0)
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert mean == pytest.approx(np.mean(expected))


# Properties and edges


def test_empty_candidates_and_references() -> None:
    scores = score({0: "", 1: "", 2: "a dog", 3: "."}, {0: ["a dog"], 1: [""], 2: [""], 3: ["", "a cat"]})
    for metric in WITHOUT_JAVA:
        assert np.isfinite(scores.items[metric]).all()  # type: ignore[call-overload]
    assert scores.items["rouge_l"].tolist() == [0, 1, 0, 1]  # type: ignore[union-attr]
    assert scores.items["bleu_4"][[0, 1]].tolist() == [0, 0]  # type: ignore[index]
    assert scores.items["cider"].tolist() == [0, 0, 0, 0]  # type: ignore[union-attr]
    scores = score({}, {})
    assert scores.ids == ()
    assert all(math.isnan(scores.measured[metric]) for metric in WITHOUT_JAVA)
    assert meteor(CaptionSet([], []))[1].shape == (0,)


@given(CORPUS, st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_order_of_items_and_references_does_not_matter(corpus: list, random: object) -> None:
    order = list(range(len(corpus)))
    random.shuffle(order)  # type: ignore[attr-defined]
    first = score({i: corpus[i][0] for i in range(len(corpus))}, {i: corpus[i][1] for i in range(len(corpus))})
    second = score({i: corpus[i][0] for i in reversed(order)}, {i: corpus[i][1][::-1] for i in order})
    assert second.ids == tuple(order)
    for metric in WITHOUT_JAVA:
        assert second.corpus[metric] == pytest.approx(first.corpus[metric], abs=1e-12)
        np.testing.assert_allclose(second.items[metric], first.items[metric][order], atol=1e-12)  # type: ignore[index,call-overload]


def test_captions_without_a_partner_are_refused() -> None:
    for candidates, references in ((["a", "b"], [["a"]]), (["a"], [[]])):
        with pytest.raises(ValueError, match="reference"):
            CaptionSet(candidates, references)


# METEOR where Java is missing


def test_missing_meteor_is_none_and_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(captions: CaptionSet) -> None:
        raise JavaUnavailable("no `java` on the PATH")

    monkeypatch.setattr(scoring, "meteor", missing)
    with caplog.at_level(logging.WARNING):
        scores = score_captions({0: "a dog"}, {0: ["a dog"]})
    assert scores.corpus["meteor"] is None
    assert scores.items["meteor"] is None
    assert "meteor" not in scores.measured
    assert [record.getMessage() for record in caplog.records] == ["METEOR is not measured: no `java` on the PATH"]
    assert scores.corpus["bleu_1"] == pytest.approx(1)
