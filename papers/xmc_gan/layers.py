"""Layers of XMC-GAN: conditional batch normalization, spectral normalization, and convolutions that change resolution.

Convolutions are rearranged for speed; the results equal [3] and [4]. 1x1 convolutions commute with a change of
resolution, so they run on the smaller maps. A 3x3 convolution with a change of resolution becomes a 4x4 convolution
with stride 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.memory.groups import groups_here, join_groups, shared_with, split_groups
from common.training.batch_norm import statistics_over

# -- normalization -----------------------------------------------------------------------------------------------------


class BiasedBatchNorm(nn.Module):
    """Batch normalization without weights. Its running variance is biased, as in the official code.

    Each group of `group` images (None: the whole batch) is normalized separately and may span devices. Running
    statistics come from the first group on rank 0, and only change while `updating` is true.

    Shapes:
        [B, C, H, W] -> [B, C, H, W]

    Source: [3.3] and [6.4].
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, channels: int, group: int | None = None) -> None:
        super().__init__()
        self.group = group
        self.momentum, self.epsilon = 0.1, 1e-5
        self.updating = True
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_variance, eps=self.epsilon)
        ranks = shared_with(len(x), self.group)
        if ranks is not None:
            return self._over_ranks(x, ranks)
        first, *others = split_groups(x, groups_here("model.generator.batch_norm_group", len(x), self.group))
        done = [self._alone(first), *(F.batch_norm(y, None, None, training=True, eps=self.epsilon) for y in others)]
        return join_groups(done) if others else done[0]

    def _alone(self, x: Tensor) -> Tensor:
        if not self.updating:
            return F.batch_norm(x, None, None, training=True, eps=self.epsilon)
        # Update copies, because the backward pass doesn't allow changes of its inputs.
        mean, variance = self.running_mean.clone(), self.running_variance.clone()
        y = F.batch_norm(x, mean, variance, training=True, momentum=self.momentum, eps=self.epsilon)
        count = x.numel() // x.shape[1]
        # PyTorch used the unbiased variance, which is count / (count - 1) times the biased variance.
        kept = self.running_variance * (1.0 - self.momentum)
        self.running_variance.copy_(kept + (variance - kept) * ((count - 1) / count))
        self.running_mean.copy_(mean)
        return y

    def _over_ranks(self, x: Tensor, ranks: Any) -> Tensor:
        wide = x.float()
        mean, variance, _ = statistics_over(wide, ranks)
        if self.updating:
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_variance.lerp_(variance.detach(), self.momentum)
        scale = torch.rsqrt(variance + self.epsilon)[:, None, None]
        return ((wide - mean[:, None, None]) * scale).to(x.dtype)


@contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
    """Normalize batches as in training, but keep the running statistics unchanged.

    Source: [6.1]: statistics ignore the images of steps that only train the discriminator.
    """
    norms = [module for module in network.modules() if isinstance(module, BiasedBatchNorm)]
    for norm in norms:
        norm.updating = False
    try:
        yield
    finally:
        for norm in norms:
            norm.updating = True


class ConditionalBatchNorm(nn.Module):
    """Batch normalization with scale and shift from a condition: BN(x) * (1 + gamma(c)) + beta(c).

    With `spatial`, the condition is a map, so each place has a different scale and shift. The map may be smaller than x
    by an integer factor; each place then uses the nearest place of the map.

    Shapes:
        x [B, C, H, W], condition [B, K], or [B, K, h, w] if `spatial` -> [B, C, H, W]

    Source: [3.3], [3.6] and the speed-up of 3.7.
    """

    def __init__(self, channels: int, conditions: int, spatial: bool, group: int | None = None) -> None:
        super().__init__()
        self.norm = BiasedBatchNorm(channels, group)
        self.spatial = spatial
        self.modulation = nn.Conv2d(conditions, 2 * channels, 1) if spatial else nn.Linear(conditions, 2 * channels)
        for half in self.modulation.weight.chunk(2):
            nn.init.xavier_normal_(half)
        nn.init.zeros_(self.modulation.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.modulation(condition)
        if not self.spatial:
            modulation = modulation[:, :, None, None]
        elif modulation.shape[-2:] != x.shape[-2:]:
            modulation = enlarge(modulation, x.shape[-1] // modulation.shape[-1])
        gamma, beta = modulation.chunk(2, dim=1)
        return torch.addcmul(beta, self.norm(x), 1.0 + gamma)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Repeat every place of a map [B, C, H, W] in both directions: [B, C, factor H, factor W] of the same type."""
    with torch.autocast(x.device.type, enabled=False):  # on CUDA, autocast would convert to float32
        return F.interpolate(x, scale_factor=float(factor), mode="nearest")


# -- convolutions ------------------------------------------------------------------------------------------------------


class DoublingConv(nn.Conv2d):
    """Doubles the resolution (nearest), then applies a 3x3 convolution. One transposed convolution does both.

    It needs 4/9 of the products.

    Shapes:
        [B, inputs, H, W] -> [B, outputs, 2 H, 2 W]
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        kernel = 4.0 * means_of_shifts(self.weight).flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def means_of_shifts(weight: Tensor) -> Tensor:
    """Average the four copies of a 3x3 kernel that are shifted by 0 or 1 in each direction: [..., 4, 4]."""
    return F.avg_pool2d(F.pad(weight, (1, 1, 1, 1)), 2, stride=1)


def spectral_weight(layer: SpectralLinear | SpectralConv) -> Tensor:
    """Divide a layer's weight [out, ...] by its largest singular value, estimated with one power iteration.

    Evaluation also iterates, but doesn't store the result. PyTorch's spectral norm doesn't iterate in evaluation, and
    uses another epsilon.

    Source: [4.1].
    """
    with torch.autocast(layer.weight.device.type, enabled=False):
        matrix = layer.weight.flatten(1)
        with torch.no_grad():
            v = _unit(layer.u @ matrix)
            u = _unit(matrix @ v)
            if layer.training:
                layer.u.copy_(u)
        sigma = u @ (matrix @ v)
        return layer.weight / (sigma + 1e-10)


def _unit(vector: Tensor) -> Tensor:
    return vector * torch.rsqrt(vector.square().sum() + 1e-10)


class SpectralLinear(nn.Linear):
    u: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("u", 0.01 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, spectral_weight(self), self.bias)


class SpectralConv(nn.Conv2d):
    """Convolution with spectral normalization.

    `halve` adds 2x2 mean pooling. Convolution and pooling run as one convolution, which needs 4/9 of the products.
    """

    u: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, halve: bool = False) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.halve = halve
        self.register_buffer("u", 0.01 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = spectral_weight(self)
        if self.halve:
            return F.conv2d(x, means_of_shifts(weight), self.bias, stride=2, padding=1)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


def initialize(network: nn.Module) -> None:
    """Set Glorot-normal weights and zero biases in every layer, except those that compute scale and shift."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not name.endswith("modulation"):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
