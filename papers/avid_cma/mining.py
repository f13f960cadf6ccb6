"""Cross-modal agreement: finds items that are similar to a given item in both modalities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from common.memory.collective import all_gather_concat, rank, world_size

Agreement = Literal["consensus", "union", "video", "audio"]


@torch.no_grad()
def mine_positives(video: Tensor, audio: Tensor, k: int, agreement: Agreement = "consensus", rows: int = 256) -> Tensor:
    """Find the k items that agree most with each item, by exhaustive search. Each rank searches for some of the items.

    The agreement of two items with bank similarities s_v and s_a is `min(s_v, s_a)` (consensus, the method), `max(s_v,
    s_a)` (union), `s_v` (video) or `s_a` (audio). An item is never its own positive. `rows` items are searched at once.

    Shapes:
        video, audio [N, d], unit rows, k < N -> int32 [N, k], each row in ascending order, the same on every rank

    Source: [7].
    """
    found = []
    part = -(-len(video) // world_size())  # gathering needs equal parts: the last rank repeats the last item
    own = torch.arange(rank() * part, (rank() + 1) * part, device=video.device).clamp(max=len(video) - 1)
    for items in own.split(rows):
        scores = _agreement(video, audio, items, agreement)
        scores[range(len(items)), items] = -torch.inf
        found.append(scores.topk(k, sorted=False).indices.sort().values.int())
    return all_gather_concat(torch.cat(found))[: len(video)]


def _agreement(video: Tensor, audio: Tensor, items: Tensor, agreement: Agreement) -> Tensor:
    """Agreement [M, N] of M items with all N items."""
    if agreement == "video":
        return video[items] @ video.T
    if agreement == "audio":
        return audio[items] @ audio.T
    combine = {"consensus": torch.minimum, "union": torch.maximum}[agreement]
    return combine(video[items] @ video.T, audio[items] @ audio.T)
