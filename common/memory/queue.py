"""Queue of keys: embeddings of earlier batches, used as negatives in later batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from common.memory.collective import Replicated

Warm = Literal["random", "masked"]

_BLOCK_BYTES = 4 << 20  # of rows that a CPU multiplies at once, small enough for its cache


class KeyQueue(Replicated):
    """Queue of the last `size` keys, with the image and tags of each key.

    Every rank holds the full queue and writes the keys of all ranks. So all copies stay equal, and only the start needs
    a broadcast. The state dict holds everything.

    The queue starts with random unit vectors. If `warm` is `random`, as in MoCo, they are negatives; if `masked`, they
    are ignored. They are never positives.

    Args:
        size: number of keys, K.
        tag_count: number of tags, T. 0 stores no tags.

    Attributes:
        vectors: the keys, unit rows [K, d].
        image_id: image of each key, int64 [K]; -1 if unknown.
        tags: tags of each key's image, bool [K, T]; only with `tag_count`.
        valid: True for slots that have been written, bool [K].
        pointer: next slot to write, int64 [].

    Examples:
        >>> queue, keys = KeyQueue(size=64, dim=8), torch.eye(8)
        >>> positive, negatives = queue.scores(queries=keys, keys=keys)
        >>> positive.shape, negatives.shape
        (torch.Size([8]), torch.Size([8, 64]))
        >>> queue.write(keys)  # after the backward pass

    Source: docs/papers/mct.md [5].
    """

    vectors: Tensor
    image_id: Tensor
    tags: Tensor
    valid: Tensor
    pointer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        tag_count: int = 0,
        warm: Warm = "random",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.size = size
        self.dim = dim
        self.tag_count = tag_count
        self.warm = warm
        vectors = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
        vectors /= vectors.norm(dim=1, keepdim=True)
        self.register_buffer("vectors", vectors)
        self.register_buffer("image_id", torch.full((size,), -1))
        if tag_count:
            self.register_buffer("tags", torch.zeros(size, tag_count, dtype=torch.bool))
        self.register_buffer("valid", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    # -- writing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, keys: Tensor, image_id: Tensor | None = None, tags: Tensor | None = None) -> None:
        """Replace the oldest keys with new unit keys. Gather the new keys from all ranks in rank order first.

        If there are more new keys than `size`, only the last `size` are stored. `image_id` is at least 0; None means
        unknown. A queue with tags needs `tags`.

        Shapes:
            keys [M, d]; image_id [M]; tags [M, T]
        """
        surplus = max(len(keys) - self.size, 0)
        slots = (self.pointer + torch.arange(surplus, len(keys), device=keys.device)) % self.size
        self.vectors.index_copy_(0, slots, keys[surplus:].to(self.vectors.dtype))
        if image_id is None:
            self.image_id.index_fill_(0, slots, -1)
        else:
            self.image_id.index_copy_(0, slots, image_id[surplus:].long())
        if tags is not None:
            self.tags.index_copy_(0, slots, tags[surplus:].bool())
        self.valid.index_fill_(0, slots, True)
        self.pointer.copy_((self.pointer + len(keys)) % self.size)

    # -- reading -------------------------------------------------------------------------------------------------------

    def scores(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the dot products of each query with its key and with the whole queue.

        Gradients flow to the queries only. The backward pass reads the queue, so call `write` afterwards. Queries are
        float32 or float64. If the loss needs a temperature, divide the queries first.

        Shapes:
            queries [B, d]; keys [B, d] of the same type -> products with the keys [B] and with the queue [B, K]
        """
        return _Scores.apply(queries, keys, self.vectors)

    def negatives_mask(self, image_id: Tensor | None = None) -> Tensor | None:
        """Mark the slots that are negatives of each anchor. Return None if all slots are.

        Excludes keys of the same image, if the anchors' `image_id` is given. If `warm` is `masked`, also excludes
        unwritten slots.

        Shapes:
            image_id [B] -> bool [B, K], or [1, K] without image ids
        """
        written = self.valid if self.warm == "masked" else None
        if image_id is None:
            return None if written is None else written[None]
        mask = self.image_id != image_id[:, None]
        # An unknown image matches no other.
        mask |= self.image_id < 0
        if written is not None:
            mask &= written
        return mask

    def shared_tags(self, tags: Tensor, epsilon: float) -> Tensor:
        """Mark slots whose image shares more than `epsilon` tags with the anchor's image. 0.5 means at least one tag.

        Shapes:
            tags [B, T] of 0 and 1 -> bool [B, K], False at unwritten slots

        Source: docs/papers/mct.md [4] (P of J_tag).
        """
        # Float16 counts exactly up to 2,048 and is faster on a GPU; on a CPU it is far slower than float32.
        half = self.tags.is_cuda and self.tag_count <= 2048
        dtype = torch.float16 if half else torch.float32
        anchors = tags.bool().to(dtype)
        shared = torch.empty(len(tags), self.size, dtype=torch.bool, device=tags.device)
        with torch.autocast(tags.device.type, enabled=False):
            for slots, block in _blocks(self.tags, dtype):
                torch.gt(anchors @ block.T, epsilon, out=shared[:, slots])
        return shared.logical_and_(self.valid)


class _Scores(torch.autograd.Function):
    """Multiplies queries with keys and a queue, which is read in blocks. Gradients flow to the queries only."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(keys, vectors)
        scores = queries.new_empty(len(queries), len(vectors))
        for rows, block in _blocks(vectors, queries.dtype):
            torch.mm(queries, block.T, out=scores[:, rows])
        return (queries * keys).sum(dim=1), scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, own: Tensor, others: Tensor) -> tuple[Tensor, None, None]:
        keys, vectors = ctx.saved_tensors
        gradient = own[:, None] * keys
        for rows, block in _blocks(vectors, keys.dtype):
            gradient.addmm_(others[:, rows], block)
        return gradient, None, None


def _blocks(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield each block's slice and its rows in `dtype`. A later block may overwrite an earlier one."""
    limit = _BLOCK_BYTES * (1 if rows.device.type == "cpu" else 64)
    step = min(len(rows), max(1, limit // (rows.shape[1] * dtype.itemsize)))
    # All blocks share one buffer: on a CPU, allocating each would take far longer than the conversion.
    buffer = None if rows.dtype == dtype else rows.new_empty(step, rows.shape[1], dtype=dtype)
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, rows[part] if buffer is None else buffer[: part.stop - start].copy_(rows[part])
