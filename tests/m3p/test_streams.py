"""Compare text streams, drawn languages and the step schedule with the released code, and check determinism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from common.data.text import XLMRTokenizer
from papers.m3p import captions
from papers.m3p.captions import file_identity, stream_tokens
from papers.m3p.streams import LanguageStream, MultitaskSteps, Schedule, draw_sources, language_probabilities
from tests.m3p.tiny import GOLDEN, values
from tests.machine import LONG

TEXTS = ["a dog and a cat", "", "ein hund", "un chien rouge et un chat", "犬 と 猫", "狗 和 猫", "pes a kočka"]


@pytest.fixture(scope="module")
def tokenizer() -> XLMRTokenizer:
    tokenizer = XLMRTokenizer(vocabulary_size=80, max_tokens=8)
    tokenizer.prepare(TEXTS)
    return tokenizer


def test_blocks_equal_the_released_code() -> None:
    with np.load(GOLDEN / "stream_dataset.npz", allow_pickle=False) as golden:
        stream = LanguageStream(golden["sentences"], int(golden["batch_size"]), int(golden["bptt"]))
        assert len(stream) == golden["n_batches"]
        for number, block in enumerate(golden["blocks"]):
            np.testing.assert_array_equal(stream.block(number).T, block)


@given(count=st.integers(1, 60), batch=st.integers(1, 5), bptt=st.integers(1, 7))
@settings(max_examples=60)
def test_blocks_hold_every_token_once(count: int, batch: int, bptt: int) -> None:
    tokens = np.arange(10, 10 + count)
    stream = LanguageStream(tokens, batch, bptt)
    blocks = np.concatenate([stream.block(number) for number in range(len(stream))], axis=1)
    assert blocks.shape == (batch, len(stream) * bptt)
    assert (blocks[:, 0] == 2).all()
    found = blocks[blocks != 2]
    assert len(set(found.tolist())) == len(found)
    # The first column shifts the tokens by one, so every row lacks the last token of its part.
    assert len(found) >= count - batch
    for row in blocks:
        own = row[row != 2]
        assert (np.diff(own) == 1).all()


@pytest.mark.parametrize("alpha", ["0.3", "0.5", "0.7", "1.0"])
def test_languages_are_drawn_as_by_the_released_code(alpha: str) -> None:
    golden = values("sampling_and_optim")
    counts, expected = golden["language_counts"], golden["language_probs_by_factor"][alpha]
    found = language_probabilities(list(counts.values()), float(alpha))
    assert dict(zip(counts, found)) == pytest.approx(expected, abs=1e-12)


@given(
    sources=st.integers(0, 5), steps=st.integers(1, 30), draws=st.integers(0, 4), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_turns_count_what_was_drawn_before(sources: int, steps: int, draws: int, seed: int) -> None:
    found = draw_sources([1 / sources] * sources if sources else [], steps, draws, np.random.default_rng(seed))
    assert found.shape == (steps, min(draws, sources), 2)
    seen: dict[int, int] = {}
    for number, turn in found.reshape(-1, 2).tolist():
        assert turn == seen.get(number, 0)
        seen[number] = turn + 1


def test_a_schedule_depends_on_seed_and_epoch_alone() -> None:
    def schedule(seed: int = 0, groups: int = 1) -> MultitaskSteps:
        nothing: Any = None
        plan = Schedule(4000, 1, xmlm_steps=3, relation_steps=3, text_groups=groups, seed=seed)
        return MultitaskSteps([], [0.5, 0.3, 0.2, 0.0], [nothing] * 2, plan, nothing)

    one, other = schedule(), schedule()
    _ = other.draws(3), other.draws(1)
    for epoch in (0, 1, 0):
        first, pairs = one.draws(epoch)
        second, same_pairs = other.draws(epoch)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(pairs, same_pairs)
    languages, relations = one.draws(0)
    languages = languages[:, :, 0]
    assert languages.shape == (4000, 3, 2)
    assert relations.shape == (4000, 2, 2)  # at most one draw per data set
    counts = np.bincount(languages[..., 0].ravel(), minlength=4)
    assert counts[3] == 0
    assert chisquare(counts[:3], np.array([0.5, 0.3, 0.2]) * 12000).pvalue > 1e-3
    # Languages are drawn with replacement, so a step may read one language twice.
    assert (np.diff(np.sort(languages[..., 0], axis=1), axis=1) == 0).any()
    assert (languages != one.draws(1)[0][:, :, 0]).any()
    assert (languages != schedule(1).draws(0)[0][:, :, 0]).any()

    # Each group of rows draws its own languages. The first group's languages don't depend on the number of groups.
    drawn, same_pairs = schedule(groups=3).draws(0)
    several = list(np.moveaxis(drawn, 2, 0))
    np.testing.assert_array_equal(several[0], languages)
    np.testing.assert_array_equal(same_pairs, relations)
    for group, own in enumerate(several):
        counts = np.bincount(own[..., 0].ravel(), minlength=4)
        assert chisquare(counts[:3], np.array([0.5, 0.3, 0.2]) * 12000).pvalue > 1e-3
        for other_group in several[:group]:
            agreement = (own[..., 0] == other_group[..., 0]).mean()
            assert agreement == pytest.approx(0.5**2 + 0.3**2 + 0.2**2, abs=0.03)
    assert (several[1] != schedule(groups=3).draws(1)[0][:, :, 1]).any()


def test_tokens_of_many_texts_are_kept(
    tokenizer: XLMRTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path))
    monkeypatch.setattr(captions, "CHUNK", 3)
    expected = [token for row in tokenizer.pieces(TEXTS) for token in (*row, 2)]
    assert expected.count(2) == len(TEXTS)
    for name in (None, "texts of a test"):
        tokens = stream_tokens(TEXTS, tokenizer, name)
        assert (tokens.dtype, tokens.tolist()) == (np.int32, expected)
    (kept,) = (tmp_path / "tokens").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert stream_tokens(TEXTS, tokenizer, "texts of a test").tolist() == expected
    assert kept.stat().st_mtime_ns == stamp
    stream_tokens(TEXTS, tokenizer, "other texts")
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    monkeypatch.setenv("ASSEMBLE_CACHE", str(kept))  # a file, so no folder can be made
    assert stream_tokens(TEXTS, tokenizer, "third texts").tolist() == expected


def test_a_file_that_was_just_changed_has_no_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "en.train.txt"
    path.write_text("a dog\n", encoding="utf-8")
    monkeypatch.setattr("common.files.SETTLED_SECONDS", LONG)
    assert file_identity(path) is None
    monkeypatch.setattr("common.files.SETTLED_SECONDS", 0.0)
    assert str(path) in str(file_identity(path))
