"""Test masking: the released code's rates, what is never masked, and that each row has something masked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from papers.m3p.masking import Masking, mask_regions, mask_words
from tests.m3p.tiny import four_errors, values

GOLDEN = values("masking_and_codeswitch_stats")
VOCABULARY = 500
MASK = VOCABULARY - 1


@pytest.mark.parametrize("length", [1, 5, 10, 20, 40])
def test_words_have_the_rates_of_the_released_code(length: int) -> None:
    golden = GOLDEN[f"caption_len_{length}"]
    rows = 30_000 // length
    rng = np.random.default_rng(length)
    tokens = rng.integers(4, MASK, (rows, length))
    masked, labels = mask_words(tokens, np.ones_like(tokens, bool), rng.random((*tokens.shape, 3)), MASK, VOCABULARY)
    chosen = labels != -1
    assert (labels[chosen] == tokens[chosen]).all()
    assert (masked[~chosen] == tokens[~chosen]).all()
    expected = 0.15 + 0.85**length / length
    assert golden["expected_selected_rate"] == pytest.approx(expected, abs=1e-9)
    assert chosen.mean() == pytest.approx(expected, abs=four_errors(min(expected, 0.5), chosen.size))
    assert chosen.any(axis=1).all()
    counts = [(masked[chosen] == MASK).sum(), (masked[chosen] == tokens[chosen]).sum()]
    counts.append(chosen.sum() - sum(counts))
    # A random word may be the true word or `<mask>`, each with probability 1 / VOCABULARY.
    shares = np.array([0.8 + 0.1 / VOCABULARY, 0.1 + 0.1 / VOCABULARY, 0.1 - 0.2 / VOCABULARY])
    assert chisquare(counts, shares * chosen.sum()).pvalue > 1e-3
    assert counts[0] / chosen.sum() == pytest.approx(golden["mask"], abs=2 * four_errors(0.8, int(chosen.sum())))


def test_random_words_are_of_the_whole_vocabulary() -> None:
    rng = np.random.default_rng(0)
    tokens = np.full((400, 50), 4)
    everything = Masking(words=1.0, mask=0.0, random=1.0)
    masked, _ = mask_words(tokens, np.ones_like(tokens, bool), rng.random((*tokens.shape, 3)), 19, 20, everything)
    assert chisquare(np.bincount(masked.ravel(), minlength=20)).pvalue > 1e-3


@given(
    rows=st.lists(st.integers(0, 8), min_size=1, max_size=6), share=st.sampled_from([0.0, 0.15, 1.0]),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60)
def test_boundary_tokens_and_padding_are_never_masked(rows: list[int], share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.array(rows)
    tokens = rng.integers(4, MASK, (len(rows), 10))
    places = np.arange(10)
    maskable = (places > 0) & (places <= lengths[:, None])
    noise = rng.random((len(rows), 10, 3))
    masked, labels = mask_words(tokens, maskable, noise, MASK, VOCABULARY, Masking(words=share))
    assert (labels[~maskable] == -1).all()
    assert (masked[~maskable] == tokens[~maskable]).all()
    # An empty caption has no word to mask.
    assert ((labels != -1).any(axis=1) == (lengths > 0)).all()
    if share == 0.0:
        assert np.argwhere(labels != -1).tolist() == [[row, 1] for row in np.flatnonzero(lengths)]
    # A row's masks don't depend on other rows.
    alone = mask_words(tokens[:1], maskable[:1], noise[:1], MASK, VOCABULARY, Masking(words=share))
    assert (alone[0] == masked[:1]).all()
    assert (alone[1] == labels[:1]).all()


def test_regions_have_the_rates_of_the_released_code() -> None:
    golden = GOLDEN["regions_20"]
    rows, count = 4000, 20
    rng = np.random.default_rng(3)
    classes = rng.integers(1, 1600, (rows, count))
    zeroed, labels = mask_regions(classes, np.ones_like(classes, bool), rng.random((rows, count, 2)))
    chosen = labels != -1
    expected = 0.15 + 0.85**count / count
    assert golden["expected_labelled_rate"] == pytest.approx(expected, abs=1e-9)
    assert chosen.mean() == pytest.approx(expected, abs=four_errors(expected, chosen.size))
    assert not (zeroed & ~chosen).any()
    # If no region is chosen, we choose one at random and zero the features. The released code doesn't zero them.
    forced = 0.85**count / count
    kept = 0.9 * 0.15 / expected + forced / expected
    assert zeroed.sum() / chosen.sum() == pytest.approx(kept, abs=four_errors(kept, int(chosen.sum())))
    assert golden["expected_zeroed_of_labelled"] == pytest.approx(0.9 * 0.15 / expected, abs=1e-9)
    # All positions are equally likely.
    assert chisquare(chosen.sum(axis=0)).pvalue > 1e-3


@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=5), share=st.sampled_from([0.0, 0.15, 1.0]),
    background=st.floats(0, 1), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60)
def test_background_and_padding_are_never_masked(counts: list[int], share: float, background: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    valid = np.arange(6) < np.array(counts)[:, None]
    classes = np.where(rng.random(valid.shape) < background, 0, rng.integers(1, 9, valid.shape))
    zeroed, labels = mask_regions(classes, valid, rng.random((*valid.shape, 2)), Masking(regions=share))
    eligible = valid & (classes != 0)
    chosen = labels != -1
    assert not (chosen & ~eligible).any()
    assert not (zeroed & ~chosen).any()
    assert (labels[chosen] == classes[chosen]).all()
    assert (chosen.any(axis=1) == eligible.any(axis=1)).all()
    if share == 0.0:
        assert (zeroed == chosen).all()
        assert (chosen.sum(axis=1) <= 1).all()


def test_text_has_the_rates_of_the_released_code() -> None:
    golden = GOLDEN["xmlm_mask_out"]
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, MASK, (64, 512))
    tokens[:, 300:310] = 1
    maskable = (tokens != 1) & (np.arange(512) > 0)
    masked, labels = mask_words(tokens, maskable, rng.random((*tokens.shape, 3)), MASK, VOCABULARY, each_row=False)
    chosen = labels != -1
    assert not chosen[:, 0].any()
    assert not chosen[:, 300:310].any()
    assert (labels == 2).any()  # end tokens inside the text may be masked
    eligible = 64 * (512 - 11)
    assert chosen.sum() / eligible == pytest.approx(0.15, abs=four_errors(0.15, eligible))
    assert chosen.sum() / eligible == pytest.approx(golden["selected_rate_of_eligible"], abs=0.008)
    for name, rate in (("mask", 0.8 + 0.1 / VOCABULARY), ("keep", 0.1 + 0.1 / VOCABULARY)):
        found = (masked[chosen] == (MASK if name == "mask" else tokens[chosen])).mean()
        assert found == pytest.approx(rate, abs=four_errors(rate, int(chosen.sum())))
        assert golden[name] == pytest.approx(rate, abs=0.01)
