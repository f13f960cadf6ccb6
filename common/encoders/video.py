"""Video encoders."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from common.types import PositiveInt

BLOCKS_PER_STAGE: dict[int, tuple[int, int, int, int]] = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}

STAGES: tuple[str, ...] = ("conv1", "conv2x", "conv3x", "conv4x", "conv5x", "pool")


class SpatioTemporalBlock(nn.Module):
    """Residual block of two pairs (spatial, temporal) of convolutions. Normalizes after adding the residual.

    Args:
        out_channels: channels of the output and of every convolution in the block.
        temporal_stride, spatial_stride: strides of the first temporal and the first spatial convolution.

    Shapes:
        [B, in_channels, T, H, W] -> [B, out_channels, T / temporal_stride, H / spatial_stride, W / spatial_stride]

    Source: docs/papers/avid_cma.md [3.1].
    """

    def __init__(self, in_channels: int, out_channels: int, temporal_stride: int = 1, spatial_stride: int = 1) -> None:
        super().__init__()
        spatial_step = (1, spatial_stride, spatial_stride)
        self.spt_conv1 = nn.Conv3d(in_channels, out_channels, (1, 3, 3), spatial_step, (0, 1, 1), bias=False)
        self.spt_bn1 = nn.BatchNorm3d(out_channels)
        self.tmp_conv1 = nn.Conv3d(
            out_channels, out_channels, (3, 1, 1), (temporal_stride, 1, 1), (1, 0, 0), bias=False
        )
        self.tmp_bn1 = nn.BatchNorm3d(out_channels)
        self.spt_conv2 = nn.Conv3d(out_channels, out_channels, (1, 3, 3), 1, (0, 1, 1), bias=False)
        self.spt_bn2 = nn.BatchNorm3d(out_channels)
        self.tmp_conv2 = nn.Conv3d(out_channels, out_channels, (3, 1, 1), 1, (1, 0, 0), bias=False)
        self.out_bn = nn.BatchNorm3d(out_channels)
        self.res_conv: nn.Conv3d | None = None
        if in_channels != out_channels or temporal_stride != 1 or spatial_stride != 1:
            step = (temporal_stride, spatial_stride, spatial_stride)
            self.res_conv = nn.Conv3d(in_channels, out_channels, 1, step, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.res_conv is None else self.res_conv(x)
        x = torch.relu(self.spt_bn1(self.spt_conv1(x)))
        x = torch.relu(self.tmp_bn1(self.tmp_conv1(x)))
        x = torch.relu(self.spt_bn2(self.spt_conv2(x)))
        return torch.relu(self.out_bn(self.tmp_conv2(x) + residual))


class R2Plus1D(nn.Module):
    """R(2+1)D residual network with a full 3D stem and a global max pool; 15,379,136 parameters by default.

    Differs from torchvision's `r2plus1d_18`: the stem is a 3x7x7 convolution and a max pool, blocks don't widen in the
    middle and normalize the sum with the residual, and the last pool takes the maximum. Parameter names equal those of
    the released AVID-CMA checkpoints, except for names that `released_names` changes.

    Args:
        depth: 10, 18 or 34, with (1, 1, 1, 1), (2, 2, 2, 2) or (3, 4, 6, 3) blocks in the stages.
        width: channels of the first stage; the last has `8 * width`.
        stem_pool: use a max pool after the stem. The small model of the ablations (depth 10, 112 px) has none.
        stem_kernel, stem_stride: kernel and stride of the stem in height and width.
        temporal_strides, spatial_strides: strides of the four stages in time, and in height and width.

    Shapes:
        video [B, in_channels, T, H, W] -> features [B, 8 * width]

    Examples:
        >>> R2Plus1D(depth=10, width=8)(torch.randn(2, 3, 8, 32, 32)).shape
        torch.Size([2, 64])

    Source: docs/papers/avid_cma.md [3.1].
    """

    def __init__(
        self,
        depth: Literal[10, 18, 34] = 18,
        width: PositiveInt = 64,
        stem_pool: bool = True,
        in_channels: PositiveInt = 3,
        stem_kernel: PositiveInt = 7,
        stem_stride: PositiveInt = 2,
        temporal_strides: Sequence[PositiveInt] = (1, 2, 2, 2),
        spatial_strides: Sequence[PositiveInt] = (1, 2, 2, 2),
    ) -> None:
        super().__init__()
        for name, strides in (("temporal_strides", temporal_strides), ("spatial_strides", spatial_strides)):
            if len(strides) != 4:
                raise ValueError(f"{name}: expected one stride for each of the four stages, got {list(strides)}")
        blocks = BLOCKS_PER_STAGE[depth]
        self.feature_dim = 8 * width
        self.stage_channels = dict(zip(STAGES, (width, width, 2 * width, 4 * width, 8 * width, 8 * width)))
        stem: list[nn.Module] = [
            nn.Conv3d(
                in_channels,
                width,
                (3, stem_kernel, stem_kernel),
                (1, stem_stride, stem_stride),
                (1, stem_kernel // 2, stem_kernel // 2),
                bias=False,
            ),
            nn.BatchNorm3d(width),
            nn.ReLU(),
        ]
        if stem_pool:
            stem.append(nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
        self.conv1 = nn.Sequential(*stem)
        self.conv2x = self._stage(width, width, blocks[0], temporal_strides[0], spatial_strides[0])
        self.conv3x = self._stage(width, 2 * width, blocks[1], temporal_strides[1], spatial_strides[1])
        self.conv4x = self._stage(2 * width, 4 * width, blocks[2], temporal_strides[2], spatial_strides[2])
        self.conv5x = self._stage(4 * width, 8 * width, blocks[3], temporal_strides[3], spatial_strides[3])
        self.pool = nn.AdaptiveMaxPool3d(1)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, temporal: int, spatial: int) -> nn.Sequential:
        first = SpatioTemporalBlock(in_channels, out_channels, temporal, spatial)
        return nn.Sequential(first, *(SpatioTemporalBlock(out_channels, out_channels) for _ in range(blocks - 1)))

    @staticmethod
    def released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a checkpoint that the authors released.

        In the authors' depth-10 networks, a stage is a block, not a list of blocks: their `conv2x.spt_conv1.weight` is
        `conv2x.0.spt_conv1.weight` here. Other names and all prefixes stay.

        Source: docs/papers/avid_cma.md [3.1], [13].
        """
        return {re.sub(r"\b(conv[2-5]x)\.(?!\d)", r"\1.0.", name): tensor for name, tensor in state.items()}

    def forward_stages(self, video: Tensor) -> dict[str, Tensor]:
        """Return the feature map [B, C, T', H', W'] of each stage: `conv1`, `conv2x` ... `conv5x`, `pool`."""
        stages: dict[str, Tensor] = {}
        x = video
        for name in STAGES:
            stages[name] = x = getattr(self, name)(x)
        return stages

    def forward(self, video: Tensor) -> Tensor:
        return self.forward_stages(video)["pool"].flatten(1)
