"""Audio encoders."""

import torch
from torch import Tensor, nn

from common.types import PositiveInt

# Name of a stage -> name of its module, as in released checkpoints.
STAGES: dict[str, str] = {
    "conv1": "conv1",
    "conv2x": "block1",
    "conv3x": "block2",
    "conv4x": "block3",
    "conv5x": "block4",
    "pool": "pool",
}


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization and ReLU. The first convolution has the stride.

    Shapes:
        [B, in_channels, T, F] -> [B, out_channels, T / stride, F / stride]

    Source: docs/papers/avid_cma.md [3.2].
    """

    #: See `common.training.switches.blocks_of`.
    repeats = True

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)))


class AudioConvNet(nn.Module):
    """Plain convolutional network on a spectrogram with a global max pool; 4,725,696 parameters by default.

    Parameter names equal those of the released AVID-CMA checkpoints.

    Args:
        width: channels of the first stage; the last has `8 * width`.
        small: use stride 1 instead of 2 in the first block, for the short spectrograms of the ablations.

    Shapes:
        audio [B, in_channels, T, F] (time, frequency) -> features [B, 8 * width]

    Examples:
        >>> AudioConvNet()(torch.randn(2, 1, 200, 257)).shape
        torch.Size([2, 512])

    Source: docs/papers/avid_cma.md [3.2].
    """

    def __init__(
        self,
        width: PositiveInt = 64,
        small: bool = False,
        in_channels: PositiveInt = 1,
        stem_kernel: PositiveInt = 7,
        stem_stride: PositiveInt = 2,
    ) -> None:
        super().__init__()
        self.feature_dim = 8 * width
        self.stage_channels = dict(zip(STAGES, (width, width, 2 * width, 4 * width, 8 * width, 8 * width)))
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, width, stem_kernel, stem_stride, stem_kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.block1 = ConvBlock(width, width, 1 if small else 2)
        self.block2 = ConvBlock(width, 2 * width, 2)
        self.block3 = ConvBlock(2 * width, 4 * width, 2)
        self.block4 = ConvBlock(4 * width, 8 * width)
        self.pool = nn.AdaptiveMaxPool2d(1)

    def forward_stages(self, audio: Tensor) -> dict[str, Tensor]:
        """Return the feature map [B, C, T', F'] of each stage: `conv1`, `conv2x` ... `conv5x`, `pool` (T' = F' = 1)."""
        stages: dict[str, Tensor] = {}
        x = audio
        for stage, module in STAGES.items():
            stages[stage] = x = getattr(self, module)(x)
        return stages

    def forward(self, audio: Tensor) -> Tensor:
        return self.forward_stages(audio)["pool"].flatten(1)
