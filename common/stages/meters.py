"""What an estimate needs of Lightning and torch: training on tensors without storage, and the memory of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of all tensors that were made while it is active and are alive, and their largest sum.

    A storage counts from the operation that makes it until the last tensor that shares it is gone, those that the
    backward pass keeps included.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor, if its storage is not yet counted."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """While it is active, attention is computed as a GPU's fused kernel does it, which keeps no matrix of weights.

    On the CPU only attention without dropout is fused, so it is left out; it changes neither shapes nor arithmetic.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return func(*args, **kwargs)


def operation_counter() -> FlopCounterMode:
    """torch's counter, which also knows the fused attention of the CPU."""

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=fused)


@contextmanager
def deep_copies_without_storage() -> Iterator[None]:
    """While it lasts, tensors without storage can be deep-copied, as momentum encoders and metrics do it.

    torch copies the storage and lays a tensor over it, which fails for want of one.
    """

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    FakeTensor.__deepcopy__ = copied  # type: ignore[method-assign]
    try:
        yield
    finally:
        del FakeTensor.__deepcopy__


class Unfilled(TorchDispatchMode):
    """While it is active, nothing is drawn at random: a network is built at once, and what is never read of it takes no
    memory."""

    _FILLS = frozenset({"normal_", "uniform_", "random_", "exponential_", "bernoulli_"})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in self._FILLS:
            return args[0]
        return func(*args, **(kwargs or {}))


def take_storage_away(module: nn.Module, mode: FakeTensorMode, meter: MemoryMeter) -> None:
    """Replace all parameters and buffers of a module by tensors of the same shapes without storage.

    Args:
        module: changed in place; tensors that it shares between parts stay shared.
        mode: the fake tensors' own.
        meter: counts them from now on.
    """
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor)
                    tensors[name] = fake  # type: ignore[assignment]
                    meter.add(fake)
        if isinstance(part, nn.RNNBase):
            part._init_flat_weights()  # it keeps another list of its parameters


class FakeDevice(SingleDeviceStrategy):
    """One device whose tensors have no storage: nothing is moved there or back."""

    def __init__(self) -> None:
        super().__init__(device=torch.device("cpu"))

    def model_to_device(self) -> None:
        """The module was built there."""

    def teardown(self) -> None:
        """Nothing comes back."""


class WithoutStorage(pl.Callback):
    """Gives batches to a training on fake tensors, and has its optimizers step without asking for values.

    Args:
        mode: the fake tensors' own.
        meter: counts the batches, too.
    """

    def __init__(self, mode: FakeTensorMode, meter: MemoryMeter) -> None:
        self.mode = mode
        self.meter = meter

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let batches be prepared as real ones are, on the host, and lose their storage on the way to the device."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prepared: Callable[[Any, int], Any] = pl_module.on_before_batch_transfer

        def on_host(batch: Any, dataloader_idx: int) -> Any:
            with unset_fake_temporarily():
                return prepared(batch, dataloader_idx)

        def without_storage(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            # A copy: the same batch is handed out every time, and each must be freed as a real one is.
            fake = tree_map_only(Tensor, lambda t: self.mode.from_tensor(t.clone()), batch)
            for value in tree_leaves(fake):
                if isinstance(value, Tensor):
                    self.meter.add(value)
            return fake

        pl_module.on_before_batch_transfer = on_host  # type: ignore[method-assign]
        data.transfer_batch_to_device = without_storage

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the optimizers make their state, as a first step does it, so that one batch is like any later one.

        Fused kernels are chosen, since the others ask the counter of steps for its value on the host.
        """
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if "fused" in group:
                    group["fused"], group["foreach"] = True, False
                for parameter in group["params"]:
                    parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
