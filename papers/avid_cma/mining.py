"""Cross-modal agreement: items that are similar to an item in both modalities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from common.memory.collective import all_gather_concat
from common.memory.collective import rank as current_rank
from common.memory.collective import world_size as current_world_size

Agreement = Literal["consensus", "union", "video", "audio"]

GROUP = 8  # scores per group; the search compares group maxima first


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
    """Find the k items that agree most with each item, by exhaustive search.

    With similarities s_v and s_a of two items in the banks, agreement is `min(s_v, s_a)` (consensus, the method),
    `max(s_v, s_a)` (union), `s_v` (video) or `s_a` (audio). An item is never its own positive. Ranks split the items
    and gather the sets. At most two tiles of block x block scores exist at a time.

    Args:
        block: items per side of a tile; None picks a size for the device.
        progress: called on rank 0 with (tiles done, tiles of this rank).

    Shapes:
        video_bank, audio_bank [N, d], unit rows -> int32 [N, k], rows ascending, equal on every rank; with `world_size`
        but no process group only this rank's part [ceil(N / world_size), k]

    Source: [7].
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
    block = min(default_block(video_bank.device) if block is None else block, num_items)

    part = -(-num_items // world_size)
    first, last = min(rank * part, num_items), min((rank + 1) * part, num_items)
    own = _tiles(first, last, block)
    others = _tiles(0, first, block) + _tiles(last, num_items, block)
    search = _Search(video_bank, audio_bank, k, agreement, block, first, last)
    # Agreement is symmetric, so a tile between two blocks of this rank serves both. The diagonal comes first: it gives
    # every item a threshold that most later scores fail.
    pairs = [(rows, rows) for rows in own]
    pairs += [(rows, columns) for number, rows in enumerate(own) for columns in own[number + 1 :]]
    pairs += [(rows, columns) for rows in own for columns in others]
    for done, (rows, columns) in enumerate(pairs, start=1):
        search.visit(rows, columns, both=first <= columns.start < last)
        if progress is not None and rank == 0:
            progress(done, len(pairs))
    mined = torch.zeros(part, k, dtype=torch.int32, device=video_bank.device)  # equal parts can be gathered
    for rows in _tiles(0, last - first, block):
        mined[rows] = search.best_items[rows].sort(dim=1).values
    return all_gather_concat(mined)[:num_items]


def mine_with_progress_bar(video_bank: Tensor, audio_bank: Tensor, k: int, agreement: Agreement) -> Tensor:
    """`mine_positives` that prints its cost first and shows a progress bar."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    num_items, dim = video_bank.shape
    device, processes = video_bank.device, current_world_size()
    console.print(
        estimate_cost(num_items, dim, k, agreement=agreement, world_size=processes, device=device), soft_wrap=True
    )
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("mining positives", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return mine_positives(video_bank, audio_bank, k, agreement, progress=show)


def default_block(device: torch.device | str = "cpu") -> int:
    """Items per side of a tile: small enough for a CPU's cache, large enough to keep an accelerator busy."""
    return 1024 if torch.device(device).type == "cpu" else 8192


def estimate_cost(
    num_items: int,
    dim: int,
    k: int,
    *,
    agreement: Agreement = "consensus",
    block: int | None = None,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> str:
    """The cost of a search in one line."""
    block = min(default_block(device) if block is None else block, num_items)
    products = 2 if agreement in ("consensus", "union") else 1
    part = num_items / world_size
    operations = 2.0 * products * dim * part * (num_items - part / 2)
    memory = products * block**2 * 4 + part * k * 8 + num_items * k * 4
    return (
        f"mining {k} positives for each of {num_items:,} items: {operations / 1e12:.3g} Tflop per process "
        f"on {world_size} process(es), about {memory / 2**20:,.0f} MiB of working memory"
    )


def _tiles(start: int, stop: int, block: int) -> list[slice]:
    return [slice(first, min(first + block, stop)) for first in range(start, stop, block)]


class _Search:
    """Running best k of the items [first, last), fed one tile of scores at a time.

    Only scores above an item's lowest best-k score matter. The maxima of groups of scores find these in one pass.
    """

    def __init__(
        self, video_bank: Tensor, audio_bank: Tensor, k: int, agreement: Agreement, block: int, first: int, last: int
    ) -> None:
        self.banks = {"video": [video_bank], "audio": [audio_bank]}.get(agreement, [video_bank, audio_bank])
        self.combine = torch.maximum if agreement == "union" else torch.minimum
        self.k = k
        self.first = first
        self.num_groups = -(-block // GROUP)
        self.side = self.num_groups * GROUP
        self.buffers = [video_bank.new_empty(self.side, self.side) for _ in self.banks]
        self.best_scores = video_bank.new_full((last - first, k), -torch.inf)
        self.best_items = torch.zeros(last - first, k, dtype=torch.int32, device=video_bank.device)

    def visit(self, rows: slice, columns: slice, both: bool) -> None:
        """Compare two blocks of items; `both` if the columns are items of this search too."""
        scores = self._scores(rows, columns)
        if rows == columns:
            scores.fill_diagonal_(-torch.inf)  # an item is not its own positive
            self._start(rows, scores)
            return
        grouped = scores.view(self.side, GROUP, self.num_groups)
        self._improve(rows, columns.start, grouped.amax(dim=1), scores, row_stride=self.side, item_stride=1)
        if both:
            grouped = scores.view(GROUP, self.num_groups, self.side)
            self._improve(columns, rows.start, grouped.amax(dim=0).t(), scores, row_stride=1, item_stride=self.side)

    def _scores(self, rows: slice, columns: slice) -> Tensor:
        """Tile of scores [side, side], -inf beyond the blocks."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        parts = [buffer[:height, :width] for buffer in self.buffers]
        for bank, part in zip(self.banks, parts):
            torch.mm(bank[rows], bank[columns].t(), out=part)
        if len(parts) == 2:
            self.combine(*parts, out=parts[0])
        scores = self.buffers[0]
        scores[height:] = -torch.inf
        scores[:, width:] = -torch.inf
        return scores

    def _start(self, rows: slice, scores: Tensor) -> None:
        """First tile of a block: pick the best k from the best k groups, which must contain them."""
        height = rows.stop - rows.start
        maxima = scores.view(self.side, GROUP, self.num_groups).amax(dim=1)[:height]
        groups = maxima.topk(min(self.k, self.num_groups), dim=1, sorted=False).indices
        offsets = self.num_groups * torch.arange(GROUP, device=groups.device)
        items = (groups[:, :, None] + offsets).flatten(1)
        best, order = scores[:height].gather(1, items).topk(min(self.k, items.shape[1]), dim=1, sorted=False)
        block = slice(rows.start - self.first, rows.stop - self.first)
        self.best_scores[block, : best.shape[1]] = best
        self.best_items[block, : best.shape[1]] = (items.gather(1, order) + rows.start).int()

    def _improve(
        self, rows: slice, first_item: int, maxima: Tensor, scores: Tensor, *, row_stride: int, item_stride: int
    ) -> None:
        """Merge a tile into the best k of `rows`.

        `maxima` [side, G] holds each group's maximum; group g holds the items g, g + G, g + 2G, ... of the other side,
        which starts with `first_item`. The strides are memory distances in the tile.
        """
        block = slice(rows.start - self.first, rows.stop - self.first)
        height, num_groups = rows.stop - rows.start, self.num_groups
        threshold = self.best_scores[block].amin(dim=1)
        row, group = (maxima[:height] > threshold[:, None]).nonzero().unbind(1)
        if len(row) == 0:
            return
        offsets = (num_groups * item_stride) * torch.arange(GROUP, device=row.device)
        members = scores.view(-1).take((row * row_stride + group * item_stride)[:, None] + offsets)
        hit, member = (members > threshold[row, None]).nonzero().unbind(1)
        found, row = members[hit, member], row[hit]
        item = group[hit] + num_groups * member + first_item

        # Hits are ordered by row: append each row's hits to its best k, and choose again.
        counts = torch.bincount(row, minlength=height)
        width = self.k + int(counts.max())
        place = row * width + self.k + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        candidates = scores.new_full((height, width), -torch.inf)
        candidate_items = self.best_items.new_zeros(height, width)
        candidates[:, : self.k] = self.best_scores[block]
        candidate_items[:, : self.k] = self.best_items[block]
        candidates.view(-1)[place] = found
        candidate_items.view(-1)[place] = item.int()
        self.best_scores[block], order = candidates.topk(self.k, dim=1, sorted=False)
        self.best_items[block] = candidate_items.gather(1, order)
