"""Time of word-region alignment of a batch at UNITER's sizes, against a Python loop over its pairs.

Run with `pytest tests/benchmarks/test_bench_alignment.py --benchmark-only`. The loop runs the same steps on each pair
by itself, without its padding, as one would write them down. Process CPU time on one thread, forward and backward;
`test_the_batch_is_faster` takes the two in turns and asserts the ratio of their medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.alignment import word_region_alignment

PAIRS, WORDS, REGIONS, WIDTH, ITERATIONS, BETA = 64, 24, 36, 64, 50, 0.5
Step = Callable[[], Tensor]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, masks and which pairs match; of both words and regions two thirds count on average."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(PAIRS, WORDS, WIDTH, generator=generator, requires_grad=True)
    regions = torch.randn(PAIRS, REGIONS, WIDTH, generator=generator, requires_grad=True)
    masks = [
        torch.arange(size) < torch.randint(size // 3, size + 1, (PAIRS, 1), generator=generator)
        for size in (WORDS, REGIONS)
    ]
    return words, regions, masks[0], masks[1], torch.arange(PAIRS) % 2 == 0


def one_by_one(words: Tensor, regions: Tensor, word_mask: Tensor, region_mask: Tensor, matched: Tensor) -> Tensor:
    """The straightforward form: each pair without its padding."""
    total = words.new_zeros(())
    for text, image, kept, seen, true in zip(words, regions, word_mask, region_mask, matched):
        cost = 1 - F.normalize(text[kept], dim=1) @ F.normalize(image[seen], dim=1).T
        with torch.no_grad():
            count_words, count_regions = cost.shape
            kernel = torch.exp(-cost.T / BETA)
            sigma = torch.full((count_words,), 1 / count_words)
            plan = torch.ones(count_regions, count_words)
            for _ in range(ITERATIONS):
                now = kernel * plan
                delta = 1 / (count_regions * (now @ sigma))
                sigma = 1 / (count_words * (now.T @ delta))
                plan = delta[:, None] * now * sigma[None, :]
        distance = (cost * plan.T).sum()
        total = total + (distance if true else -distance)
    return total / len(words)


def steps() -> dict[str, Step]:
    inputs = batch()

    def ours() -> Tensor:
        loss = word_region_alignment(*inputs, beta=BETA, iterations=ITERATIONS)
        loss.backward()
        return loss.detach()

    def loop() -> Tensor:
        loss = one_by_one(*inputs)
        loss.backward()
        return loss.detach()

    return {"loop": loop, "ours": ours}


@pytest.mark.benchmark(timer=time.process_time, group="word-region alignment")
@pytest.mark.parametrize("form", ["loop", "ours"])
def test_step(benchmark: Any, form: str) -> None:
    benchmark.pedantic(steps()[form], rounds=10, warmup_rounds=2)


def test_the_batch_is_faster(benchmark: Any) -> None:
    forms = steps()
    torch.testing.assert_close(forms["ours"](), forms["loop"](), rtol=1e-4, atol=1e-5)
    seconds: dict[str, list[float]] = {name: [] for name in forms}

    def compare() -> None:
        for _ in range(10):
            for name, step in forms.items():
                start = time.process_time()
                step()
                seconds[name].append(time.process_time() - start)

    benchmark.pedantic(compare, rounds=1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["loop"] / medians["ours"]
    benchmark.extra_info.update({f"{name}_ms": round(1000 * median, 2) for name, median in medians.items()})
    benchmark.extra_info["ratio"] = round(ratio, 2)
    print(f"\nword-region alignment: {benchmark.extra_info}")
    assert ratio > 3
