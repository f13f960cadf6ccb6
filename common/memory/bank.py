"""Memory bank: one stored unit vector per data set item, and losses against many of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.memory.collective import all_gather_concat, broadcast_from_rank_zero, require_equal_over_ranks


class MemoryBank(nn.Module):
    """Unit vectors, one per item, blended with the embeddings that training produces.

    Every rank holds the full bank. `update` gathers the batch of all ranks and applies the same change everywhere, so
    the copies stay equal without ever broadcasting the bank after the start.

    Args:
        num_items: rows of the bank, one per item of the data set listing.
        dim: width of an embedding.
        momentum: share of the old row that an update keeps, in [0, 1].

    Raises:
        ValueError: when a size or the momentum is out of range.

    Source: specification 4.
    """

    vectors: Tensor

    def __init__(self, num_items: int, dim: int, momentum: float = 0.5) -> None:
        super().__init__()
        if num_items < 1 or dim < 1:
            raise ValueError(f"num_items and dim must be positive, got num_items={num_items}, dim={dim}")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.num_items = num_items
        self.dim = dim
        self.momentum = momentum
        self.register_buffer("vectors", F.normalize(torch.randn(num_items, dim), dim=1))

    def extra_repr(self) -> str:
        return f"{self.num_items} x {self.dim}, momentum={self.momentum}"

    def lookup(self, index: Tensor) -> Tensor:
        """Rows of the given items.

        Args:
            index: item numbers.

        Shapes:
            index [...] -> [..., d]

        Returns:
            A copy, without gradient.
        """
        rows = self.vectors.index_select(0, index.reshape(-1))
        return rows.view(*index.shape, self.dim)

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Tensor) -> None:
        """Blend the rows of a batch with its embeddings: row <- normalise(m * row + (1 - m) * embedding).

        The batches of all ranks are joined in rank order. When an item occurs more than once, every occurrence blends
        with the old row and the last one is kept, on every device alike.

        Args:
            index: item numbers of this rank's batch.
            embeddings: unit vectors of this rank's batch.

        Shapes:
            index [B]; embeddings [B, d]
        """
        self.blend(all_gather_concat(index), all_gather_concat(embeddings.float()))

    @torch.no_grad()
    def blend(self, index: Tensor, embeddings: Tensor, last: Tensor | None = None) -> None:
        """Local part of `update`: takes a batch that was gathered from all ranks already.

        Args:
            index: item numbers of the global batch, in rank order.
            embeddings: unit vectors of the global batch.
            last: `last_occurrence(index)`, where several banks share it.

        Shapes:
            index [M]; embeddings [M, d]; last [M]
        """
        last = last_occurrence(index) if last is None else last
        old = self.vectors.index_select(0, index)
        new = F.normalize(torch.lerp(embeddings, old, self.momentum), dim=1)
        # All occurrences of an item write the same values, so the order of the writes does not matter.
        self.vectors.index_copy_(0, index, new.index_select(0, last))

    def broadcast_from_rank_zero(self) -> None:
        """Give every rank the bank of rank 0. Call once, before the first step."""
        broadcast_from_rank_zero(self.vectors)

    @torch.no_grad()
    def check_replicas(self, name: str = "the memory bank", rows: int = 1024) -> None:
        """Raise unless the banks of all ranks agree, bit for bit, on a sample of rows.

        Args:
            name: what to call this bank in the error.
            rows: number of rows compared, evenly spaced; at least `num_items` compares everything.

        Raises:
            RuntimeError: when a rank differs.
        """
        sample = torch.linspace(0, self.num_items - 1, min(rows, self.num_items), device=self.vectors.device).long()
        bits = self.lookup(sample).view(torch.int32).long()
        # Position-dependent odd weights: exchanged rows or columns change the sum as well. Integer overflow just wraps.
        weights = 2 * torch.arange(bits.numel(), device=bits.device).view_as(bits) + 1
        require_equal_over_ranks((bits * weights).sum(), name)


def last_occurrence(index: Tensor) -> Tensor:
    """Position of the last entry with the same value, for every entry, without host synchronisation.

    Args:
        index: item numbers, repeated ones allowed.

    Shapes:
        index [M] -> [M]

    Returns:
        Positions into `index`; an entry that occurs once points at itself.
    """
    order = torch.argsort(index, stable=True)
    return order[torch.searchsorted(index[order], index, right=True) - 1]


def interleave(banks: Sequence[MemoryBank]) -> Tensor:
    """Joint view [N, V, d] of banks whose rows of one item lie side by side in memory.

    A contrastive step reads the same random rows of every bank; side by side, one gather fetches them all. The first
    call, and the first after the banks were moved to another device or replaced, lays the banks out anew and turns
    `bank.vectors` into views of the joint storage; later calls only look at what they are views of.

    Args:
        banks: V banks of equal size on one device.

    Returns:
        Tensor [N, V, d] that shares its memory with every `bank.vectors`.
    """
    first = banks[0].vectors
    num_items, dim = first.shape
    strides = (len(banks) * dim, dim, 1)
    # By the tensor that they are views of and not by addresses, which a tensor without storage does not have.
    is_joint = first._base is not None and all(
        bank.vectors._base is first._base
        and bank.vectors.stride() == (strides[0], 1)
        and bank.vectors.storage_offset() == first.storage_offset() + position * dim
        for position, bank in enumerate(banks)
    )
    if is_joint:
        return first.as_strided((num_items, len(banks), dim), strides)
    # A validation step may come first; tensors made in inference mode could never be updated by a training step.
    with torch.inference_mode(False), torch.no_grad():
        joint = torch.stack([bank.vectors for bank in banks], dim=1)
        for position, bank in enumerate(banks):
            bank.vectors = joint[:, position]
    return joint


class RowContrast:
    """Scores and losses of embeddings against chosen rows of one or more banks.

    Gathering the rows costs more than all arithmetic of a step, so every row is gathered once, for all banks and terms.
    The banks need no gradient: the gradient of the embeddings is computed right after the scores, block of anchors by
    block of anchors, while the block's rows are still in the cache. Nothing but that small gradient is kept for the
    backward pass.

    Args:
        block_bytes: bound of the memory for gathered rows on a CPU; an accelerator takes 64 times as much.
    """

    def __init__(self, block_bytes: int = 17 << 20) -> None:
        self.block_bytes = block_bytes
        self._buffer: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"block_bytes": self.block_bytes, "_buffer": None}

    @torch.no_grad()
    def scores(self, embeddings: Tensor, joint: Tensor, rows: Tensor) -> Tensor:
        """Dot products of every embedding with the chosen rows of every bank, without gradient.

        Args:
            embeddings: E embeddings per anchor, float32.
            joint: V banks as `interleave` returns them.
            rows: C chosen rows per anchor.

        Shapes:
            embeddings [B, E, d]; joint [N, V, d]; rows [B, C]

        Returns:
            [B, E, V, C].
        """
        return torch.cat([_scores(embeddings[anchors], gathered) for anchors, gathered in self.blocks(joint, rows)])

    def loss(
        self, embeddings: Tensor, joint: Tensor, rows: Tensor, loss: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Loss of the scores, differentiable once, in the embeddings only.

        Args:
            embeddings: E embeddings per anchor, float32.
            joint: V banks as `interleave` returns them.
            rows: C chosen rows per anchor.
            loss: maps scores [b, E, V, C] of a block to (scalar loss, vector of terms [T]), all of them means over
                anchors.

        Shapes:
            embeddings [B, E, d]; joint [N, V, d]; rows [B, C]

        Returns:
            (scalar loss, terms [T] without gradient).
        """
        if not (embeddings.requires_grad and torch.is_grad_enabled()):
            total, terms = loss(self.scores(embeddings, joint, rows))
            return total, terms
        return _RowLoss.apply(embeddings, joint, rows, loss, self)

    def blocks(self, joint: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of anchors, their rows [b, C, V, d]); the next block overwrites the rows."""
        batch, columns = rows.shape
        views, dim = joint.shape[1:]
        on_cpu = joint.device.type == "cpu"
        limit = self.block_bytes * (1 if on_cpu else 64)
        block = max(1, min(batch, limit // (columns * views * dim * joint.element_size())))
        size = block * columns * views * dim
        if on_cpu:
            # Fresh pages from the system would cost as much as the gather itself, so the buffer is kept between steps.
            if self._buffer is None or self._buffer.numel() < size:
                with torch.inference_mode(False):
                    self._buffer = joint.new_empty(size)
            buffer = self._buffer
        else:
            buffer = joint.new_empty(size)  # an accelerator's allocator keeps it
        for start in range(0, batch, block):
            anchors = slice(start, min(start + block, batch))
            chosen = rows[anchors].reshape(-1)
            gathered = buffer[: chosen.numel() * views * dim].view(-1, views, dim)
            torch.index_select(joint, 0, chosen, out=gathered)
            yield anchors, gathered.view(-1, columns, views, dim)


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, joint, rows, loss, contrast):
        gradient = torch.empty_like(embeddings)
        totals, terms = [], []
        for anchors, gathered in contrast.blocks(joint, rows):
            share = gathered.shape[0] / rows.shape[0]
            scores = _scores(embeddings[anchors], gathered)
            with torch.enable_grad():
                block_total, block_terms = loss(scores.requires_grad_())
                (score_gradient,) = torch.autograd.grad(block_total, scores)
            gradient[anchors] = _weighted_rows(score_gradient * share, gathered)
            totals.append(block_total.detach() * share)
            terms.append(block_terms.detach() * share)
        ctx.save_for_backward(gradient)
        mean_terms = torch.stack(terms).sum(0)
        ctx.mark_non_differentiable(mean_terms)
        return torch.stack(totals).sum(0), mean_terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, total_gradient, _):
        (gradient,) = ctx.saved_tensors
        return gradient * total_gradient, None, None, None, None


def _scores(embeddings: Tensor, gathered: Tensor) -> Tensor:
    """[b, E, d] x [b, C, V, d] -> [b, E, V, C], contiguous."""
    scores = torch.bmm(embeddings, gathered.flatten(1, 2).transpose(1, 2))
    return scores.unflatten(2, gathered.shape[1:3]).transpose(2, 3).contiguous()


def _weighted_rows(weights: Tensor, gathered: Tensor) -> Tensor:
    """[b, E, V, C] x [b, C, V, d] -> [b, E, d]."""
    return torch.bmm(weights.transpose(2, 3).flatten(2), gathered.flatten(1, 2))
