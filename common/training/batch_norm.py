"""Batch normalization over groups of a fixed number of samples, on any number of devices.

PyTorch normalizes over the samples of one device, so results depend on the number of devices. Here, each group is
normalized separately, and devices that share a group exchange statistics. `common.memory.groups` defines which samples
form a group.

Running statistics come from a batch's first group, as in DDP and DataParallel, which keep the first device's buffers.
Training doesn't read running statistics, so `share_buffers` sends them to the other devices only when validation or the
end of training needs them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.memory.collective import broadcast_from_rank_zero, gather_with_gradient, ranks_apart
from common.memory.groups import join_groups, require_groups, split_groups


def devices_of_group(group: int, batch_size: int, devices: int) -> int | None:
    """Return how many devices share a group. Return None if plain batch normalization gives the same result.

    Args:
        group: number of samples that share statistics, limited to the batch size.
        batch_size: global batch, divisible by `devices`.
    """
    per_device, group = batch_size // devices, min(group, batch_size)
    require_groups("batch_norm_group", group, batch_size, devices)
    return None if per_device == group else max(group // per_device, 1)


def normalize_in_groups(module: nn.Module, group: int, batch_size: int, devices: int) -> None:
    """Replace batch normalization layers with grouped ones in place. All processes must call this."""
    shared = devices_of_group(group, batch_size, devices)
    if shared is None:
        return
    processes = None if shared == 1 else ranks_apart(devices // shared)
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm | GroupedBatchNorm):
                parent.add_module(name, GroupedBatchNorm(layer, group, processes))


def share_buffers(module: nn.Module) -> None:
    """Broadcast rank 0's buffers, except buffers that DDP ignores. All processes must call this."""
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    for name, buffer in module.named_buffers():
        if name not in ignored:
            broadcast_from_rank_zero(buffer)


def statistics_over(x: Tensor, processes: Any) -> tuple[Tensor, Tensor, int]:
    """Compute each channel's mean and biased variance over several processes, with gradient, and the number of values.

    Args:
        x: float32 or float64, with the same number of values on every process.

    Shapes:
        x [B, C, ...] -> mean [C], variance [C]
    """
    var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    means, variances = gather_with_gradient(torch.stack([mean, var])[None], processes).unbind(1)
    mean = means.mean(0)
    var = variances.mean(0) + (means - mean).square().mean(0)
    return mean, var, len(means) * x.numel() // x.shape[1]


class GroupedBatchNorm(_BatchNorm):
    """Normalizes each group of samples separately in training. Evaluation is the usual batch normalization.

    Args:
        layer: layer to replace, whose weights and buffers are reused.
        group: rows per group. Each clip of a video is a row.
        processes: the processes that share one group. None if this process holds whole groups.

    Shapes:
        [B, C, ...] -> [B, C, ...]; without `processes`, B is a multiple of `group`.
    """

    def __init__(self, layer: _BatchNorm, group: int, processes: Any = None) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self._parameters, self._buffers = layer._parameters, layer._buffers
        self.training = layer.training
        self.group = group
        self.processes = processes

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected a batch [B, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        return self._within(input) if self.processes is None else self._across(input)

    def _within(self, x: Tensor) -> Tensor:
        if len(x) % self.group:
            raise ValueError(f"batch_norm_group ({self.group}) must divide the {len(x)} samples that a layer sees")
        first, *others = split_groups(x, len(x) // self.group)
        done = [super().forward(first)]  # updates the running statistics
        done += [F.batch_norm(y, None, None, self.weight, self.bias, True, 0.0, self.eps) for y in others]
        return join_groups(done)

    def _across(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            values = x if x.dtype == torch.float64 else x.float()
            mean, var, count = statistics_over(values, self.processes)
            self._remember(mean.detach(), var.detach(), count)
            scale = (var + self.eps).rsqrt()
            scale = scale if self.weight is None else scale * self.weight
            shift = -mean * scale if self.bias is None else self.bias - mean * scale
            shape = [1, -1] + [1] * (x.ndim - 2)
            return (values * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def _remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), share)
