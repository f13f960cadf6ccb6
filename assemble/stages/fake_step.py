"""Run a training step on fake tensors, which have no storage, and count the memory that real tensors would take."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of live storages that were created while it is active (`now`), and their maximum (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tree: Any) -> None:
        """Count the storages in a tree of tensors, each only once."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                size = self._known[storage] = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


#: Operators that autocast computes in float32 on CUDA but not on the CPU; see aten/src/ATen/autocast_mode.h.
FLOAT32_ON_CUDA = (
    "cumsum", "exp", "group_norm", "layer_norm", "linalg_vector_norm", "log", "log1p", "log_softmax.int", "logsumexp",
    "native_layer_norm", "norm.Scalar", "norm.ScalarOpt_dim", "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor",
    "reciprocal", "rms_norm", "rsqrt", "softmax.int", "softplus", "sum", "sum.dim_IntList", "upsample_bilinear2d",
    "upsample_nearest2d",
)  # fmt: skip
#: Operators that autocast computes in float32 only on the CPU.
FLOAT32_ON_CPU = ("adaptive_avg_pool3d", "adaptive_max_pool3d", "avg_pool3d", "max_pool3d")


@contextmanager
def memory_of_cuda() -> Iterator[None]:
    """Let CPU tensors take as much memory as on CUDA, with CUDA's autocast precisions and dropout masks.

    Fake tensors on a CUDA device would be simpler, but their backward pass needs the driver.
    """
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def widened(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    def in_float32(operator: Any) -> Any:
        def compute(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                return operator(*tree_map_only(Tensor, widened, args), **tree_map_only(Tensor, widened, kwargs))

        return compute

    def dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
        return torch.native_dropout(tensor, p, train)[0] if train and p > 0 else tensor

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in FLOAT32_ON_CUDA:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, in_float32(operator), "AutocastCPU")
        for name in FLOAT32_ON_CPU:
            library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU")
        library.impl("dropout", dropout, "AutogradCPU")
        yield


@contextmanager
def fused_attention() -> Iterator[None]:
    """Compute attention without storing the attention matrix, like a GPU's fused kernel.

    The CPU only fuses attention without dropout, so remove the dropout. This changes neither shapes nor counts. A torch
    function mode can't do this, since torch disables it while the backward pass recomputes a block.
    """
    attend = F.scaled_dot_product_attention

    def without_dropout(
        query: Any, key: Any, value: Any, mask: Any = None, dropout_p: Any = 0, *args: Any, **kw: Any
    ) -> Any:
        return attend(query, key, value, kw.pop("attn_mask", mask), 0.0, *args, **kw)

    F.scaled_dot_product_attention = without_dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


def operation_counter() -> FlopCounterMode:
    """Return torch's counter of operations, extended to count the CPU's fused attention."""

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    # Replace the tracker of modules: its hooks would keep recomputed tensors alive.
    tracker: Any = nullcontext()
    tracker.parents = ("Global",)
    counter.mod_tracker = tracker
    return counter


@contextmanager
def deep_copies_without_storage() -> Iterator[None]:
    """Let momentum encoders and metrics deep-copy fake tensors, since torch's deep copy needs a storage."""

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    FakeTensor.__deepcopy__ = copied  # type: ignore[method-assign]
    try:
        yield
    finally:
        del FakeTensor.__deepcopy__


def empty_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of this shape without values. `Tensor.to` fails for small fake tensors, which keep values."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def place(module: nn.Module, device: torch.device) -> None:
    """Move weights and buffers, and keep tied tensors tied. `Module.to` fails, because fake tensors have no storage."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in moved:
                        there = empty_copy(tensor, device)
                        is_weight = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_weight else there
                    tensors[name] = moved[id(tensor)]  # type: ignore[assignment]


class FakeDevice(SingleDeviceStrategy):
    """Moves nothing, since `place` already moved the module to the device."""

    def setup_environment(self) -> None:
        """Set up no accelerator."""

    def model_to_device(self) -> None:
        """Move nothing."""

    def teardown(self) -> None:
        """Move nothing back."""


class WithoutStorage(pl.Callback):
    """Turns batches into fake tensors, and selects optimizer kernels that read no values."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare batches with their values, as on a real host, and drop the values on transfer to the device."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prepared = pl_module.on_before_batch_transfer

        def on_host(batch: Any, dataloader_idx: int) -> Any:
            with unset_fake_temporarily():
                return prepared(batch, dataloader_idx)

        def without_storage(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            # Copy, since the loader repeats one batch, and each batch must be freed like a real one.
            return tree_map_only(Tensor, lambda tensor: empty_copy(tensor, device), batch)

        pl_module.on_before_batch_transfer = on_host  # type: ignore[method-assign]
        data.transfer_batch_to_device = without_storage

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the optimizers' state. Use fused kernels, since other kernels read the step counter on the host."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if "fused" in group:
                    group["fused"], group["foreach"] = True, False
                for parameter in group["params"]:
                    parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
