"""Time of generating answers: a batch at once with cached keys and values, against one by one without a cache.

Run with `pytest tests/benchmarks/test_bench_generation.py --benchmark-only`. A network of the miniature's size, 32
prompts, beams of 5, 12 words. Process CPU time on one thread. `test_a_batch_with_a_cache_is_faster` takes the two in
turns and asserts the ratio of their medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from papers.vx2text.language_model import LanguageModel

PROMPTS, LENGTH, WORDS, BEAMS = 32, 27, 12, 5


def decoders() -> tuple[Callable[[], list[torch.Tensor]], Callable[[], list[torch.Tensor]]]:
    torch.manual_seed(0)
    model = LanguageModel(96, 96, 2, 4, 24, 192).eval()
    model.t5.generation_config.eos_token_id = None  # all write to the limit, so that both do the same work
    embeddings, mask = torch.randn(PROMPTS, LENGTH, 96), torch.ones(PROMPTS, LENGTH, dtype=torch.bool)

    def batched() -> list[torch.Tensor]:
        return list(model.generate(embeddings, mask, BEAMS, WORDS))

    def one_by_one() -> list[torch.Tensor]:
        model.t5.generation_config.use_cache = False
        try:
            return [model.generate(embeddings[i : i + 1], mask[i : i + 1], BEAMS, WORDS)[0] for i in range(PROMPTS)]
        finally:
            model.t5.generation_config.use_cache = True

    return batched, one_by_one


@pytest.mark.parametrize("way", [0, 1], ids=["batched", "one_by_one"])
def test_generation(benchmark: Any, way: int) -> None:
    benchmark(decoders()[way])


def test_a_batch_with_a_cache_is_faster() -> None:
    ways = decoders()
    texts = [way() for way in ways]
    assert all(torch.equal(left, right) for left, right in zip(*texts))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for way, spent in zip(ways, seconds):
            start = time.process_time()
            way()
            spent.append(time.process_time() - start)
    ratio = statistics.median(seconds[1]) / statistics.median(seconds[0])
    print(f"one by one without a cache / batched with one: {ratio:.1f}")
    assert ratio > 3
