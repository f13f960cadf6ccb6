"""Time of word-region alignment of a batch at UNITER's sizes, against a Python loop over its pairs.

The loop runs the same steps on each pair by itself, without its padding, as one would write them down. Process CPU time
on one thread, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.alignment import word_region_alignment
from tests.benchmarks.speed import compare, in_turns

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


def test_the_batch_is_faster() -> None:
    forms = steps()
    torch.testing.assert_close(forms["ours"](), forms["loop"](), rtol=1e-4, atol=1e-5)
    seconds = in_turns(forms, 10)
    line = compare("word-region alignment, 64 pairs", "a loop over pairs", seconds["ours"], seconds["loop"])
    line.stays_below(1 / 3)
