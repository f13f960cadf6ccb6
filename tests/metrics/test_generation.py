"""Test the Frechet distance, inception score, R-precision and object accuracy: official values and properties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.datasets.coco import CLASSES
from common.metrics.generation import (
    FeatureStatistics,
    InceptionScore,
    Moments,
    ObjectAccuracy,
    RPrecision,
    first_ranked,
    frechet_distance,
    mentioned_classes,
    object_accuracy,
    object_captions,
    r_precision,
)
from common.metrics.generation.object_accuracy import _PHRASES

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "xmc_gan" / "metrics.npz"))


def named(*captions: str) -> list[list[str]]:
    return [[CLASSES[number] for number in mentioned_classes(caption)] for caption in captions]


# -- Frechet distance --------------------------------------------------------------------------------------------------


def test_frechet_distance_equals_the_official_one() -> None:
    found = frechet_distance(Moments.of(GOLDEN["pool_a"]), Moments.of(GOLDEN["pool_b"]))
    assert found == pytest.approx(float(GOLDEN["fid"]), rel=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_sums_over_batches_give_the_moments_of_all_rows(offset: float) -> None:
    rows = torch.from_numpy(GOLDEN["pool_a"]) + offset
    statistics = FeatureStatistics()
    for part in torch.arange(160).split(23):
        statistics.update(part, rows[part])
        statistics.update(part[:3], rows[part[:3]] + 100)  # repeated samples, which count once
    found, expected = statistics.compute(), Moments.of(rows)
    assert found.count == 160
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-6, atol=1e-9)


def test_frechet_distance_refuses_what_has_none() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 4))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(Moments.of(rows), Moments.of(np.where(rows > 1, np.nan, rows)))
    with pytest.raises(ValueError, match="at least two samples"):
        Moments.of(rows[:1])
    with pytest.raises(ValueError, match="at least two samples"):
        FeatureStatistics().compute()


def test_frechet_distance_of_features_that_share_no_direction() -> None:
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(64, 64)))[0]
    variances = np.arange(64.0)
    parts = [turn * np.where(np.arange(64) < 32, *order) @ turn.T for order in ((variances, 0), (0, variances))]
    one, other = (Moments(99, np.zeros(64), part.astype(np.float32).astype(np.float64)) for part in parts)
    assert frechet_distance(one, other) == pytest.approx(variances.sum(), rel=1e-3)
    assert frechet_distance(other, one) == pytest.approx(variances.sum(), rel=1e-3)


def test_moments_are_kept_in_a_file(tmp_path: Path) -> None:
    moments = Moments.of(GOLDEN["pool_a"])
    moments.save(tmp_path / "deep" / "real.npz")
    np.testing.assert_equal(vars(Moments.load(tmp_path / "deep" / "real.npz")), vars(moments))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["real.npz"]
    (tmp_path / "real.npz").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match=r"real\.npz"):
        Moments.load(tmp_path / "real.npz")


# -- inception score ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_equals_the_official_one(splits: int) -> None:
    probabilities = torch.from_numpy(GOLDEN["probs"])
    expected = pytest.approx(
        (float(GOLDEN[f"is_mean_split{splits}"]), float(GOLDEN[f"is_std_split{splits}"])), rel=1e-5, abs=1e-9
    )
    meter = InceptionScore(splits, total=160)
    for part in torch.arange(160).split(33):
        meter.update(part, probabilities[part])
        meter.update(part[:2], probabilities[part[:2]].flip(1))
    assert meter.compute() == expected


@pytest.mark.parametrize(
    ("probabilities", "splits", "expected"),
    [(torch.eye(4), 1, 4), (torch.full((6, 4), 0.25), 1, 1), (torch.eye(5), 2, (3 + 2) / 2)],
)
def test_inception_score_of_sure_and_of_blind_classifiers(probabilities: Any, splits: int, expected: float) -> None:
    meter = InceptionScore(splits, total=len(probabilities))
    meter.update(torch.arange(len(probabilities)), probabilities)
    assert meter.compute()[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="an image in each"):
        InceptionScore().compute()
    with pytest.raises(ValueError, match="10 parts"):
        InceptionScore(10, total=9)


# -- R-precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 8, 64, 512])
@pytest.mark.parametrize("count", [30, 200, 1000])
def test_texts_with_one_and_the_same_embedding_are_never_told_apart(count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width + count)
    text = torch.randn(1, width, generator=generator).expand(count, -1).contiguous()
    for image in (text, torch.randn(count, width, generator=generator)):
        assert r_precision(image, text)[0] == 0


def test_r_precision_of_perfect_random_and_collapsed_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(3000, 16, generator=generator)
    assert r_precision(text * 3, text) == (100.0, 0.0)
    mean, spread = r_precision(torch.randn(3000, 16, generator=generator), text)
    assert mean == pytest.approx(1.0, abs=0.6)  # chance: one in a hundred
    assert 0 < spread < 2
    assert r_precision(torch.ones(3000, 16), torch.ones(3000, 16))[0] == 0
    assert r_precision(torch.full((3000, 16), torch.nan), text)[0] == 0


def test_equal_texts_are_not_drawn_against_each_other() -> None:
    identity = torch.arange(40) % 8
    text = torch.eye(8)[identity]
    assert first_ranked(text, text, identity).all()
    assert not first_ranked(text, text, candidates=40).any()
    with pytest.raises(ValueError, match="different texts"):
        first_ranked(text, text, torch.zeros(40))


@settings(max_examples=20)
@given(seed=st.integers(0, 999), count=st.integers(5, 30), candidates=st.integers(2, 12))
def test_drawn_texts_are_others_and_all_different(seed: int, count: int, candidates: int) -> None:
    # Exactly one other text scores higher than an image's own text. The image is a hit if that text isn't drawn.
    text = torch.eye(count)
    image = torch.eye(count) + 2 * torch.eye(count).roll(1, 1)
    hits = first_ranked(image, text, None, candidates, seed)
    assert hits.equal(first_ranked(image, text, None, candidates, seed))
    if candidates >= count:
        assert not hits.any()
    assert first_ranked(torch.eye(count), text, None, candidates, seed).all()


def test_r_precision_meter_counts_every_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(101, 4, generator=generator)
    image = text + 0.7 * torch.randn(101, 4, generator=generator)
    identity = torch.arange(101)
    meter = RPrecision(candidates=20, folds=5)
    for part in torch.randperm(101, generator=generator).split(13):
        meter.update(part, image[part], text[part], identity[part])
        meter.update(part[:1], -image[part[:1]], text[part[:1]], identity[part[:1]])
    found = meter.compute()
    monkeypatch.setitem(first_ranked.__globals__, "_SCORES", 1000)  # in blocks of rows
    assert found == r_precision(image, text, identity, 20, 5)


# -- object accuracy ---------------------------------------------------------------------------------------------------


def test_captions_name_classes() -> None:
    assert named(
        "A dog and two men eat hot dogs.",
        "Teddy bears on a BED, next to a brown bear",
        "a train at the train station",
        "an orange cat, two ponies",
        "three oranges in bowls",
        "Buses, benches and knives",
        "people on skis; a child with a frisbee",
        "the remote area of a mountain",
        "computer mouse on a mouse pad",
        "a glass of wine on the dining table",
        "",
        "1234 äöü",
    ) == [
        ["person", "dog", "hot dog"],
        ["bear", "bed", "teddy bear"],
        ["train"],
        ["cat", "horse"],
        ["bowl", "orange"],
        ["bus", "bench", "knife"],
        ["person", "frisbee", "skis"],
        [],
        ["mouse"],
        ["wine glass", "dining table"],
        [],
        [],
    ]


def test_every_listed_word_is_known() -> None:
    for name, phrases in _PHRASES.items():
        for phrase in phrases.split("|"):
            assert named(f"a photo of {phrase}") == [[name] if name else []], phrase
    assert named("policemen, canoes, calves, neckties and minibuses") == [["person", "bus", "boat", "cow", "tie"]]


def test_images_of_the_object_protocol() -> None:
    captions = ["a dog", "a man", "nothing of note", "a woman and a cat", "a boy"]
    images = object_captions(captions, copies=3, person_captions=2, seed=1)
    person, dog, cat = (CLASSES.index(name) for name in ("person", "dog", "cat"))
    assert [(image.caption, image.copy) for image in images if dog in image.classes] == [(0, 0), (0, 1), (0, 2)]
    assert [(image.caption, image.copy) for image in images if cat in image.classes] == [(3, 0), (3, 1), (3, 2)]
    people = [image for image in images if person in image.classes]
    assert len(people) == 2
    assert all(image.copy == 0 for image in people)
    assert not any(image.caption == 2 for image in images)
    assert images == object_captions(captions, copies=3, person_captions=2, seed=1)
    every = object_captions(captions, copies=3)
    assert {image.caption for image in every if person in image.classes} == {1, 3, 4}


def test_object_meter_counts_every_image_once() -> None:
    named_, found = torch.rand(50, 6) < 0.4, torch.rand(50, 6) < 0.5
    meter = ObjectAccuracy(6)
    for part in torch.arange(50).split(7):
        meter.update(part, named_[part], found[part])
        meter.update(part, named_[part], ~found[part])
    assert object_accuracy(torch.tensor([10, 0, 30]), torch.tensor([10, 0, 15])) == (75.0, 62.5)
    assert meter.compute() == object_accuracy(named_.sum(0), (named_ & found).sum(0))
