"""Compare caption scores with pycocoevalcap, and retrieval, FID and average precision with torchmetrics.

The tests measure CPU time on one thread. The captions are 5,000 tokenized items, each with 5 references.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.metrics.captioning import CaptionSet
from common.metrics.captioning.scores import bleu, cider, rouge_l
from common.metrics.detection import DetectionsOncePerImage, coco_average_precision
from common.metrics.generation.frechet import FeatureStatistics, frechet_distance
from common.metrics.retrieval import score_retrieval
from tests.benchmarks.speed import compare, in_turns, peer

ITEMS, REFERENCES, VOCABULARY = 5_000, 5, 4_000
#: Our function, pycocoevalcap's module and class, and the limit of the ratio of our time to theirs.
SCORES: dict[str, tuple[Callable[[CaptionSet], Any], str, str, float]] = {
    "cider": (cider, "cider.cider", "Cider", 0.2),
    "bleu": (bleu, "bleu.bleu", "Bleu", 0.6),
    "rouge_l": (rouge_l, "rouge.rouge", "Rouge", 0.2),
}


def corpus() -> tuple[list[str], list[list[str]]]:
    """Make sentences of words with a Zipf distribution. Sentences of the same item share about half of their words."""
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


@pytest.mark.parametrize("metric", SCORES)
def test_scores_are_faster(metric: str) -> None:
    function, module, name, most = SCORES[metric]
    scorer = getattr(peer(f"pycocoevalcap.{module}"), name)
    options = {"verbose": 0} if metric == "bleu" else {}
    candidates, references = corpus()
    results = {item: [text] for item, text in enumerate(candidates)}
    truths = dict(enumerate(references))
    forms: dict[str, Callable[[], Any]] = {
        # Make a new set each time, since a set caches results.
        "ours": lambda: function(CaptionSet(candidates, references)),
        "pycocoevalcap": lambda: scorer().compute_score(truths, results, **options),
    }
    (mean, items), (their_mean, their_items) = (score() for score in forms.values())
    np.testing.assert_allclose(mean, their_mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(items.T, np.asarray(their_items), rtol=0, atol=1e-9)
    seconds = in_turns(forms, 3)
    what = f"{metric} of 5,000 captions with 5 references"
    compare(what, "pycocoevalcap", seconds["ours"], seconds["pycocoevalcap"]).stays_below(most)


def _compare_values(what: str, ours: Callable[[], dict[str, Any]], theirs: Callable[[], dict[str, Any]]) -> None:
    found, wanted = ours(), theirs()
    assert {name: float(found[name]) for name in wanted} == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-4
    )
    seconds = in_turns({"ours": ours, "torchmetrics": theirs}, 3, warm_up=0)  # the calls above were the warm-up
    compare(what, "torchmetrics", seconds["ours"], seconds["torchmetrics"])


def test_retrieval_against_torchmetrics() -> None:
    """Compare the 1K protocol of COCO's captions, computed from the scores of all pairs."""
    metric = peer("torchmetrics.retrieval").RetrievalHitRate
    torch.manual_seed(0)
    owner = torch.arange(1000).repeat_interleave(5)
    own = owner == torch.arange(1000)[:, None]
    scores = torch.randn(1000, 5000) + 3 * own

    def theirs() -> dict[str, Tensor]:
        found = {}
        for direction, rows, relevant in (("i2t", scores, own), ("t2i", scores.T, own.T)):
            query = torch.arange(len(rows))[:, None].expand_as(rows)
            for k in (1, 5, 10):
                hits = metric(top_k=k)
                hits.update(rows, relevant, indexes=query)
                found[f"{direction}_r{k}"] = 100 * hits.compute()
        return found

    what = "recalls at 1, 5 and 10 of 1,000 images and 5,000 captions"
    _compare_values(what, lambda: score_retrieval(scores, owner), theirs)


def test_fid_against_torchmetrics() -> None:
    """Compare the computation from features to FID, since both implementations would use the same network."""
    torchmetrics = peer("torchmetrics.image.fid")
    torch.manual_seed(0)
    real, fake = torch.randn(2, 3000, 768)
    fake = 1.1 * fake + 0.1

    def ours() -> dict[str, float]:
        moments = []
        for features in (real, fake):
            statistics = FeatureStatistics()
            for index in torch.arange(len(features)).split(100):
                statistics.update(index, features[index])
            moments.append(statistics.compute())
        return {"fid": frechet_distance(*moments)}

    def theirs() -> dict[str, Tensor]:
        identity = nn.Identity()
        identity.num_features = 768
        fid = torchmetrics.FrechetInceptionDistance(identity)
        for features in (real, fake):
            for index in torch.arange(len(features)).split(100):
                fid.update(features[index], real=features is real)
        return {"fid": fid.compute()}

    _compare_values("FID of 3,000 images, from 768 features", ours, theirs)


def test_average_precision_against_torchmetrics() -> None:
    """Compare COCO's average precision, which both implementations compute with pycocotools."""
    torchmetrics = peer("torchmetrics.detection")
    torch.manual_seed(0)
    corner, size = 400 * torch.rand(499, 20, 2), 20 + 100 * torch.rand(499, 20, 2)
    boxes = torch.cat([corner, corner + size], dim=2)
    near, labels, scores = boxes + 4 * torch.randn_like(boxes), torch.arange(20) % 7, torch.rand(499, 20)
    objects = [{"boxes": image[:7], "labels": labels[:7]} for image in boxes]
    found = [{"boxes": image, "labels": labels, "scores": score} for image, score in zip(near, scores)]

    def ours() -> dict[str, float]:
        detections = DetectionsOncePerImage()
        detections.update(torch.arange(len(found)), found, objects)
        return coco_average_precision(detections.compute().values())

    def theirs() -> dict[str, Tensor]:
        metric = torchmetrics.MeanAveragePrecision()
        metric.update(found, objects)
        values = metric.compute()
        return {"ap": values["map"], "ap50": values["map_50"], "ap75": values["map_75"]}

    _compare_values("average precision of 499 images with 20 boxes", ours, theirs)
