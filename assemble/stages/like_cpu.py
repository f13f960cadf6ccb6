"""Make a GPU compute what the CPU does, up to rounding, for `assemble verify --device cuda`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


@contextmanager
def like_cpu(tf32: bool = False) -> Iterator[None]:
    """Draw random numbers on the CPU, and compute float32 products at full precision (or in TF32, if `tf32`).

    This only affects the current thread, so run the stages in the same thread.
    """
    cudnn: Any = torch.backends.cudnn
    backends: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    for backend in backends:
        backend.fp32_precision = "tf32" if tf32 else "ieee"
    with sdpa_kernel(SDPBackend.MATH), DrawsOnCPU():  # other kernels draw the mask of dropout themselves
        yield


class DrawsOnCPU(TorchDispatchMode):
    """Draws all random numbers on the CPU, such as dropout masks, because a GPU's generator draws others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = tensors[0].device if tensors else kwargs.get("device")
        moved, options = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        drawn = func(*moved, **{**options, **({"device": torch.device("cpu")} if "device" in kwargs else {})})
        if func._schema.is_mutable:
            return args[0].copy_(drawn)
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), drawn)
