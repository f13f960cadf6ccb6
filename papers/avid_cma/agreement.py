"""Cross-modal agreement: which other items are similar to an item in both modalities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from common.memory.collective import all_gather_concat
from common.memory.collective import rank as current_rank
from common.memory.collective import world_size as current_world_size

Agreement = Literal["consensus", "union", "video", "audio"]


@torch.no_grad()
def mine_positives(
    video_bank: Tensor,
    audio_bank: Tensor,
    k: int,
    agreement: Agreement = "consensus",
    *,
    block: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Tensor:
    """The k items that agree most with every item, by exhaustive search.

    With s_v and s_a the similarities of two items in the video and audio bank, their agreement is
    `min(s_v, s_a)` (consensus, the method), `max(s_v, s_a)` (union), `s_v` (video) or `s_a` (audio).
    An item is never its own positive. Queries are split over ranks and the sets are gathered.

    Args:
        video_bank: unit rows.
        audio_bank: unit rows.
        k: positives per item.
        agreement: how the two similarities combine.
        block: queries handled at once; chosen from N when None.
        progress: called on rank 0 with (queries done, queries of this rank).
        rank: this process; the running process group's by default.
        world_size: number of processes; the running process group's by default.

    Shapes:
        video_bank [N, d]; audio_bank [N, d]

    Returns:
        int32 [N, k], every row ascending, on the device of the banks, equal on every rank. Where `world_size` is given
        without a process group, only this rank's part [ceil(N / world_size), k].

    Raises:
        ValueError: when k does not leave every item k others, or `agreement` is unknown.

    Source: specification 7.
    """
    num_items = video_bank.shape[0]
    if agreement not in get_args(Agreement):
        raise ValueError(f"agreement must be one of {', '.join(get_args(Agreement))}, got {agreement!r}")
    if not 1 <= k < num_items:
        raise ValueError(
            f"positives={k} is impossible with {num_items} items: an item has only {num_items - 1} others. "
            "Lower `positives` or use a larger listing."
        )
    rank = current_rank() if rank is None else rank
    world_size = current_world_size() if world_size is None else world_size
    block = default_block(num_items) if block is None else block

    # Equal parts, so that they can be gathered; surplus queries of the last rank repeat the last item.
    part = -(-num_items // world_size)
    queries = torch.arange(rank * part, (rank + 1) * part, device=video_bank.device).clamp_(max=num_items - 1)
    search = _Search(video_bank, audio_bank, k, agreement, block)
    mined = torch.empty(part, k, dtype=torch.int32, device=video_bank.device)
    for start in range(0, part, block):
        mined[start : start + block] = search(queries[start : start + block])
        if progress is not None and rank == 0:
            progress(min(start + block, part), part)
    return all_gather_concat(mined)[:num_items]


def default_block(num_items: int) -> int:
    """Queries per block: large enough for fast products, small enough to keep the scores of a block near 128 MiB."""
    return max(16, min(256, (32 << 20) // num_items))


def estimate_cost(
    num_items: int,
    dim: int,
    k: int,
    *,
    agreement: Agreement = "consensus",
    block: int | None = None,
    world_size: int = 1,
) -> str:
    """One line on what a search will cost, to print before it starts.

    Args:
        num_items: rows of a bank.
        dim: width of a row.
        k: positives per item.
        agreement: how the two similarities combine.
        block: queries handled at once.
        world_size: processes that share the work.
    """
    block = default_block(num_items) if block is None else block
    products = 2 if agreement in ("consensus", "union") else 1
    operations = 2.0 * products * num_items**2 * dim / world_size
    memory = products * block * num_items * 4 + num_items * k * 4
    return (
        f"mining {k} positives for each of {num_items:,} items: {operations / 1e12:.3g} Tflop per process "
        f"on {world_size} process(es), about {memory / 2**20:,.0f} MiB of working memory"
    )


class _Search:
    """Exact top-k of one block of queries at a time, with buffers that are allocated once."""

    def __init__(self, video_bank: Tensor, audio_bank: Tensor, k: int, agreement: Agreement, block: int) -> None:
        self.banks = {"video": [video_bank], "audio": [audio_bank]}.get(agreement, [video_bank, audio_bank])
        self.combine = torch.maximum if agreement == "union" else torch.minimum
        self.k = k
        self.buffers = [video_bank.new_empty(block, video_bank.shape[0]) for _ in self.banks]

    def __call__(self, queries: Tensor) -> Tensor:
        scores = self.buffers[0][: len(queries)]
        torch.mm(self.banks[0][queries], self.banks[0].t(), out=scores)
        if len(self.banks) == 2:
            other = self.buffers[1][: len(queries)]
            torch.mm(self.banks[1][queries], self.banks[1].t(), out=other)
            self.combine(scores, other, out=scores)
        scores.scatter_(1, queries[:, None], -torch.inf)  # an item is not its own positive
        return scores.topk(self.k, dim=1, sorted=False).indices.sort(dim=1).values.int()
