"""Captions collected over batches and processes, each sample once."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from common.metrics.captioning import CaptionMeter, CaptionScores, JavaUnavailable, score_captions
from tests.distributed.harness import run_distributed

WORDS = ["a", "man", "dog", "opens", "the", "door", "and", "isn't", "here", "walks.", "caf\u00e9", "two\u2028lines"]


def samples(number: int) -> list[tuple[int, str, list[str]]]:
    draw = random.Random(3)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(0, 9)))

    return [(7 * i, text(), [text() for _ in range(draw.randint(1, 4))]) for i in range(number)]


def fill(meter: CaptionMeter, chosen: list[tuple[int, str, list[str]]], batch: int = 3) -> CaptionMeter:
    for start in range(0, len(chosen), batch):
        index, candidates, references = zip(*chosen[start : start + batch])
        meter.update(torch.tensor(index), candidates, references)
    return meter


def expected(number: int, protocol: Any = "coco") -> CaptionScores:
    everything = samples(number)
    return score_captions(
        {i: text for i, text, _ in everything}, {i: texts for i, _, texts in everything}, protocol, with_meteor=False
    )


def test_batches_give_what_one_call_gives() -> None:
    everything = samples(11)
    shuffled = random.Random(0).sample(everything, len(everything))
    meter = fill(CaptionMeter("avsd7", with_meteor=False), shuffled)
    scores = meter.compute()
    assert scores.ids == tuple(i for i, _, _ in everything)
    assert scores.corpus == expected(11, "avsd7").corpus
    assert meter.compute().corpus == scores.corpus  # computing changes nothing


def test_a_sample_seen_again_counts_once() -> None:
    meter = fill(CaptionMeter(with_meteor=False), samples(5))
    again = samples(5)[2]
    meter.update([again[0]], ["something else"], [again[2]])
    assert meter.compute().corpus == expected(5).corpus


def test_nothing_seen_and_reset() -> None:
    meter = CaptionMeter(with_meteor=False)
    assert meter.compute().ids == ()
    assert np.isnan(meter.compute().measured["cider"])
    fill(meter, samples(4)).reset()
    meter.update([], [], [])
    assert meter.compute().ids == ()


@pytest.mark.parametrize("index", [[3, 4], (3, 4), torch.tensor([3, 4]), torch.tensor([3, 4]).int(), np.array([3, 4])])
def test_forms_of_the_index(index: Any) -> None:
    meter = CaptionMeter(with_meteor=False)
    meter.update(index, ["a", "b"], (("a",), ["b", "c"]))
    assert meter.compute().ids == (3, 4)


def test_bad_batches_are_named() -> None:
    meter = CaptionMeter(with_meteor=False)
    with pytest.raises(ValueError, match="candidates: expected one entry for each of 2 samples, got 1"):
        meter.update([0, 1], ["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"candidates: .* got one string"):
        meter.update([0, 1], "ab", [["a"], ["b"]])
    # What the default collate function makes of three references for each of two samples.
    with pytest.raises(ValueError, match="references: expected one entry for each of 2 samples, got 3"):
        meter.update([0, 1], ["a", "b"], [("a", "b"), ("a", "b"), ("a", "b")])
    with pytest.raises(ValueError, match="item 1: no reference"):
        meter.update([0, 1], ["a", "b"], [["a"], []])
    with pytest.raises(TypeError, match="item 0: references must be a list of strings, got str"):
        meter.update([0], ["a"], ["a"])
    with pytest.raises(TypeError):
        meter.update([0.5], ["a"], [["a"]])  # type: ignore[list-item]
    meter.update([9], ["a"], [["a"]])
    with pytest.raises(ValueError, match="sample 9 came with two different sets of references"):
        meter.update([9], ["a"], [["b"]])


def test_bad_options_are_refused_before_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="protocol"):
        CaptionMeter("avsd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer"):
        CaptionMeter(tokenizer="perl")  # type: ignore[arg-type]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(JavaUnavailable, match="java"):
        CaptionMeter(tokenizer="java")


@pytest.mark.parametrize(("world_size", "number"), [(2, 7), (3, 2)])
def test_processes_count_every_sample_once(world_size: int, number: int) -> None:
    def collect(rank: int) -> tuple[tuple[int, ...], dict[str, Any], list[float]]:
        everything = samples(number)
        own = everything[rank::world_size]
        if own and len(own) < -(-number // world_size):
            own = [*own, everything[0]]  # as a distributed sampler fills up
        scores = fill(CaptionMeter(with_meteor=False), own).compute()
        assert scores.items["cider"] is not None
        return scores.ids, scores.corpus, scores.items["cider"].tolist()

    alone = expected(number)
    assert alone.items["cider"] is not None
    for ids, corpus, cider in run_distributed(collect, world_size):
        assert tuple(ids) == alone.ids
        assert corpus == alone.corpus
        assert cider == alone.items["cider"].tolist()


def test_failure_of_the_first_process_reaches_all() -> None:
    def collect(rank: int) -> str:
        meter = fill(CaptionMeter(with_meteor=False), samples(4)[rank::2])
        if rank == 0:
            meter.tokenizer = "none"  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match=r"first process could not score.*tokenizer: 'none'"):
            meter.compute()
        return "raised"

    assert run_distributed(collect) == ["raised", "raised"]


def test_processes_with_other_references_are_refused_everywhere() -> None:
    def collect(rank: int) -> str:
        meter = CaptionMeter(with_meteor=False)
        meter.update([5], ["a"], [[f"reference {rank}"]])
        with pytest.raises(ValueError, match="sample 5 came with two different sets"):
            meter.compute()
        return "raised"

    assert run_distributed(collect) == ["raised", "raised"]
