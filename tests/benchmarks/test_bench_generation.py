"""Time of generating answers: a batch at once with cached keys and values, against one by one without a cache.

A network of the miniature's size, 32 prompts, beams of 5, 12 words. Process CPU time on one thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from papers.vx2text.language_model import LanguageModel
from tests.benchmarks.speed import compare, in_turns

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


def test_a_batch_with_a_cache_is_faster() -> None:
    batched, one_by_one = decoders()
    assert all(torch.equal(left, right) for left, right in zip(batched(), one_by_one()))
    seconds = in_turns({"ours": batched, "loop": one_by_one}, 3)
    line = compare("32 answers, beams of 5", "one by one, no cache", seconds["ours"], seconds["loop"])
    line.stays_below(1 / 3)
