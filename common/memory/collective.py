"""Collective primitives for state that every rank holds a full copy of."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group of more than one rank is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Global rank of this process; 0 when not distributed."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of ranks; 1 when not distributed."""
    return dist.get_world_size() if is_distributed() else 1


@torch.no_grad()
def all_gather_concat(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along the first dimension, in rank order, without gradient.

    Args:
        tensor: local part; every rank must pass the same shape and type.

    Shapes:
        tensor [B, ...] -> [W * B, ...]

    Returns:
        The same tensor on every rank; the detached input when not distributed.
    """
    tensor = tensor.detach()
    if not is_distributed():
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


@torch.no_grad()
def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Plain mean of a tensor over ranks, without gradient.

    The parts are added in rank order, so that the result is the same on every rank to the last bit.

    Args:
        tensor: local value; every rank must pass the same shape and type.

    Returns:
        Tensor of the same shape.
    """
    return all_gather_concat(tensor.unsqueeze(0)).mean(dim=0)


@torch.no_grad()
def broadcast_from_rank_zero(tensor: Tensor) -> None:
    """Overwrite `tensor` on every rank with rank 0's values.

    Args:
        tensor: any layout; changed in place.
    """
    if not is_distributed():
        return
    # A strided view (banks that share one storage) cannot be sent as it is.
    flat = tensor.detach().contiguous()
    dist.broadcast(flat, src=0)
    if flat.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(flat)


def require_equal_over_ranks(checksum: Tensor, what: str) -> None:
    """Raise unless every rank holds the same checksum.

    Args:
        checksum: a small integer tensor that summarises the local state.
        what: name of the state for the error message.

    Raises:
        RuntimeError: names the ranks that differ from rank 0.
    """
    if not is_distributed():
        return
    checksums = all_gather_concat(checksum.reshape(1, -1))
    differing = (checksums != checksums[:1]).any(dim=1).nonzero().flatten().tolist()
    if differing:
        raise RuntimeError(
            f"{what} differs between ranks: rank(s) {differing} disagree with rank 0. Every rank must start from the "
            "same state (call initialise(), or restore the same checkpoint) and see the same updates in the same order."
        )
