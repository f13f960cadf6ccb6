"""Test caption scores: golden numbers of coco-caption, properties, and edge cases."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics.captioning import METRICS, CaptionScores, CaptionSet, JavaUnavailable, score_captions, scoring
from common.metrics.captioning.meteor import meteor
from common.metrics.captioning.scores import bleu, cider, rouge_l
from common.metrics.captioning.scoring import preparation

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vx2text" / "caption_metrics.json").read_text())
ITEMS = GOLDEN["items"]
PROTOCOLS = ["coco", "tvc", "avsd_1ref", "avsd7", "avsd8"]
WITHOUT_JAVA = [metric for metric in METRICS if metric != "meteor"]


def score(candidates: dict, references: dict, *args: object, **options: object) -> CaptionScores:
    return score_captions(candidates, references, *args, with_meteor=False, **options)  # type: ignore[arg-type]


# Tests of golden numbers


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
        # Compare relative errors too. Otherwise 1e-16 would pass for 1e-8, because both are small.
        np.testing.assert_allclose(per_item, golden, rtol=1e-9, atol=1e-15 if metric == "cider" else 0)


@pytest.mark.parametrize("protocol", ["avsd_1ref", "avsd8"])
def test_golden_word_filters(protocol: str) -> None:
    prepare, _ = preparation(protocol)  # type: ignore[arg-type]
    assert [prepare(item["hyp"]) for item in ITEMS] == [item["filtered_hyp"][protocol] for item in ITEMS]


# Tests of protocols


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


# Tests of properties and edge cases


SENTENCE = st.lists(st.sampled_from("abcde"), max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4)), min_size=1, max_size=6)


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


def test_the_closest_reference_may_be_the_longest_of_all() -> None:
    assert bleu(CaptionSet(["a dog runs"], [["a dog runs fast"]]))[0][0] == pytest.approx(math.exp(1 - 4 / 3))


def test_captions_without_a_partner_are_refused() -> None:
    for candidates, references in ((["a", "b"], [["a"]]), (["a"], [[]])):
        with pytest.raises(ValueError, match="reference"):
            CaptionSet(candidates, references)


# Tests of METEOR without Java


def test_missing_meteor_is_none_and_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(captions: CaptionSet) -> None:
        raise JavaUnavailable("no `java` on the PATH")

    monkeypatch.setattr(scoring, "meteor", missing)
    scoring._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scores = score_captions({0: "a dog"}, {0: ["a dog"]})
    assert scores.corpus["meteor"] is None
    assert scores.items["meteor"] is None
    assert "meteor" not in scores.measured
    assert [record.getMessage() for record in caplog.records] == ["METEOR is not measured: no `java` on the PATH"]
    assert scores.corpus["bleu_1"] == pytest.approx(1)
