"""Communication between ranks: replicated state, and losses over the global batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Return whether a process group of more than one rank is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the global rank of this process, 0 if not distributed."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of ranks, 1 if not distributed."""
    return dist.get_world_size() if is_distributed() else 1


@torch.no_grad()
def all_gather_concat(tensor: Tensor, ranks: Any = None) -> Tensor:
    """Concatenate tensors [B, ...] of equal shape in rank order, without gradient -> [W * B, ...]."""
    tensor = tensor.detach()
    if not is_distributed():
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(parts, tensor, group=ranks)
    return torch.cat(parts)


@torch.no_grad()
def all_gather_rows(*tensors: Tensor | None) -> list[Any]:
    """Apply `all_gather_concat` to several tensors [B, ...] of any types in one message. None stays None."""
    given = [tensor.detach() for tensor in tensors if tensor is not None]
    if is_distributed() and given:
        rows = len(given[0])
        widths = [math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in given]
        sent = [tensor.contiguous().view(torch.uint8).view(rows, width) for tensor, width in zip(given, widths)]
        received = all_gather_concat(torch.cat(sent, dim=1)).split(widths, dim=1)
        given = [
            part.contiguous().view(tensor.dtype).view(len(part), *tensor.shape[1:])
            for part, tensor in zip(received, given)
        ]
    found = iter(given)
    return [None if tensor is None else next(found) for tensor in tensors]


@torch.no_grad()
def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average over ranks, without gradient. The sum is in rank order, so the result is bitwise equal on every rank."""
    return all_gather_concat(tensor.unsqueeze(0)).mean(dim=0)


def share_of_mean(count: int, device: torch.device) -> Tensor | float:
    """Return the weight of this rank's mean over `count` items, so that averaging over ranks gives the global mean."""
    if not is_distributed():
        return 1.0
    mean = mean_over_ranks(torch.full((), float(count), device=device))  # `torch.tensor` would wait for a copy
    return count / mean.clamp(min=1e-9)


@torch.no_grad()
def broadcast_from_rank_zero(tensor: Tensor) -> None:
    """Overwrite `tensor` on every rank with rank 0's values."""
    if not is_distributed():
        return
    # A strided view (banks may share one storage) cannot be sent.
    flat = tensor.detach().contiguous()
    dist.broadcast(flat, src=0)
    if flat.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(flat)


class Replicated(nn.Module):
    """Base of modules whose buffers are equal on every rank, because every rank makes the same updates."""

    @torch.no_grad()
    def synchronize(self) -> None:
        """Copy the buffers of rank 0 to every rank. Call once, before the first step."""
        for buffer in self.buffers():
            broadcast_from_rank_zero(buffer)

    @torch.no_grad()
    def check_replicas(self, name: str = "the memory") -> None:
        """Check that buffers are bitwise equal on all ranks, or raise RuntimeError. Compares up to 1,024 rows each."""
        sums = []
        for buffer in self.buffers():
            if buffer.is_floating_point():
                sample = torch.linspace(0, len(buffer) - 1, min(1024, len(buffer)), device=buffer.device).long()
                buffer = buffer.index_select(0, sample).view(torch.int32)
            values = buffer.long().flatten()
            # Odd weights make the sum depend on the order; overflow just wraps.
            sums.append((values * (2 * torch.arange(len(values), device=values.device) + 1)).sum())
        checksums = all_gather_concat(torch.stack(sums)[None])
        differing = (checksums != checksums[:1]).any(dim=1).nonzero().flatten().tolist()
        if differing:
            raise RuntimeError(
                f"{name} differs between ranks: rank(s) {differing} disagree with rank 0. Start every rank from "
                "the same state (synchronize() or the same checkpoint) and make the same updates in the same order."
            )


def ranks_apart(step: int) -> Any:
    """Return the group of all ranks whose distance to this rank is a multiple of `step`. Every rank must call this."""
    return _ranks_apart(dist.group.WORLD, step)


@functools.cache
def _ranks_apart(world: Any, step: int) -> Any:
    groups = [dist.new_group(range(first, dist.get_world_size(world), step)) for first in range(step)]
    return groups[dist.get_rank(world) % step]


def gather_with_gradient(tensor: Tensor, ranks: Any = None) -> Tensor:
    """Concatenate tensors [B, ...] of several ranks in rank order, with gradients -> [W * B, ...].

    The backward pass sums the gradients of all ranks. If every rank computes the loss of the global batch, the average
    of the ranks' weight gradients equals the gradients of a single process. All shapes and types must be equal.
    """
    return _Gather.apply(tensor, ranks) if is_distributed() else tensor


@torch.no_grad()
def average_in_place(tensors: list[Tensor]) -> None:
    """Replace each tensor by the mean over ranks, in one message. All tensors must have the same type."""
    if not is_distributed() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    _copy_parts(flat, tensors)


class OverlappedAverage:
    """Averages gradients over ranks while the backward pass still runs.

    The first pass of a kind sends all gradients at the end, and records the order in which rank 0 completed gradients.
    Later passes send buckets in that order. A bucket waits for the previous buckets, so every rank sends the same
    buckets in the same order.
    """

    def __init__(self, bucket_bytes: int = 25 * 2**20) -> None:
        self.bucket_bytes = bucket_bytes
        self._buckets: dict[str, list[list[int]]] = {}

    @contextmanager
    def of(self, parameters: Sequence[nn.Parameter], kind: str = "") -> Iterator[None]:
        """Average the gradients of `parameters`, including accumulated ones, in a block with one backward pass.

        Args:
            kind: name for backward passes that reach the same parameters. Every rank must run the kinds in the same
                order.
        """
        if not is_distributed():
            yield
            return
        buckets = self._buckets.get(kind, [])
        bucket_of = {index: number for number, bucket in enumerate(buckets) for index in bucket}
        missing = [len(bucket) for bucket in buckets]
        order: list[int] = []
        sent: list[tuple[Any, Tensor, list[Tensor]]] = []

        def send(bucket: list[int]) -> None:
            for index in bucket:
                if parameters[index].grad is None:  # another rank may have a gradient
                    parameters[index].grad = torch.zeros_like(parameters[index])
            gradients = [parameters[index].grad for index in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])  # type: ignore[union-attr]
            sent.append((dist.all_reduce(flat, async_op=True), flat, gradients))  # type: ignore[arg-type]

        def complete(index: int, parameter: Tensor) -> None:
            order.append(index)
            if index in bucket_of:
                missing[bucket_of[index]] -= 1
            while len(sent) < len(buckets) and not missing[len(sent)]:
                send(buckets[len(sent)])

        hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(complete, index))
            for index, parameter in enumerate(parameters)
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for bucket in buckets[len(sent) :]:
            send(bucket)
        if rest := [i for i, p in enumerate(parameters) if p.grad is not None and i not in bucket_of]:
            send(rest)
        for work, flat, gradients in sent:
            work.wait()  # on a GPU, only the stream waits
            flat /= world_size()
            _copy_parts(flat, gradients)
        if kind not in self._buckets:
            shared = [order]
            dist.broadcast_object_list(shared, src=0)
            self._buckets[kind] = self._split(shared[0], parameters)

    def _split(self, order: list[int], parameters: Sequence[nn.Parameter]) -> list[list[int]]:
        buckets: list[list[int]] = []
        size = 0
        for index in order:
            size += parameters[index].nbytes
            if not buckets or size > self.bucket_bytes:
                buckets.append([])
                size = parameters[index].nbytes
            buckets[-1].append(index)
        return buckets


@torch.no_grad()
def _copy_parts(flat: Tensor, tensors: list[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Any) -> Tensor:
        ctx.size, ctx.ranks = len(tensor), ranks
        return all_gather_concat(tensor, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.ranks)
        own = dist.get_rank(ctx.ranks)
        return total[own * ctx.size : (own + 1) * ctx.size], None
