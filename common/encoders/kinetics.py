"""R(2+1)D with torchvision's structure, for the public Kinetics weights of the 34-layer network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D

from common.types import Fraction, PositiveFloat, PositiveInt


class KineticsR2Plus1D(nn.Module):
    """R(2+1)D residual network with the parameter names of torchvision's `VideoResNet`, without `fc`.

    The default fits the public IG-65M and Kinetics weights: 34 layers, 63,697,175 parameters with a head of 400
    classes. The default differs from torchvision in the epsilon and momentum of batch normalization, and in
    `wide_second`.

    Args:
        stem_channels: channels between the spatial and the temporal convolution of the stem.
        stem_kernel, stem_stride: kernel and stride of the stem's spatial convolution.
        wide_second: in the first block of stages 2 to 4, compute the middle width of the second convolution as if input
            and output channels were equal, like the public weights. False follows torchvision (61,831,661 parameters).

    Shapes:
        [B, 3, T, H, W] -> [B, feature_dim]; 512 features by default.

    Examples:
        >>> KineticsR2Plus1D(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))(torch.randn(1, 3, 8, 32, 32)).shape
        torch.Size([1, 64])

    Source: docs/papers/vx2text.md [3].
    """

    def __init__(
        self,
        layers: Sequence[PositiveInt] = (3, 4, 6, 3),
        channels: Sequence[PositiveInt] = (64, 128, 256, 512),
        stem_channels: PositiveInt = 45,
        stem_kernel: PositiveInt = 7,
        stem_stride: PositiveInt = 2,
        wide_second: bool = True,
        norm_epsilon: PositiveFloat = 1e-3,
        norm_momentum: Fraction = 0.9,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(
                3, stem_channels, (1, stem_kernel, stem_kernel), (1, stem_stride, stem_stride),
                (0, stem_kernel // 2, stem_kernel // 2), bias=False,
            ),
            nn.BatchNorm3d(stem_channels),
            nn.ReLU(inplace=True),
            nn.Conv3d(stem_channels, channels[0], (3, 1, 1), 1, (1, 0, 0), bias=False),
            nn.BatchNorm3d(channels[0]),
            nn.ReLU(inplace=True),
        )  # fmt: skip
        width = channels[0]
        self.stages = len(layers)
        for number, (blocks, wide) in enumerate(zip(layers, channels, strict=True), start=1):
            stride = 1 if number == 1 else 2
            self.add_module(f"layer{number}", _stage(width, wide, blocks, stride, wide_second))
            width = wide
        self.feature_dim = width
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                module.eps, module.momentum = norm_epsilon, norm_momentum

    def forward(self, video: Tensor) -> Tensor:
        x = self.stem(video)
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return x.mean((2, 3, 4))


def _stage(inside: int, outside: int, blocks: int, stride: int, wide_second: bool) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inside != outside:
        shortcut = nn.Sequential(nn.Conv3d(inside, outside, 1, stride, bias=False), nn.BatchNorm3d(outside))
    first = BasicBlock(inside, outside, Conv2Plus1D, stride, shortcut)
    if stride != 1 and wide_second:
        middle = (outside * outside * 27) // (outside * 9 + 3 * outside)
        first.conv2[0] = Conv2Plus1D(outside, outside, middle)
    return nn.Sequential(first, *(BasicBlock(outside, outside, Conv2Plus1D) for _ in range(blocks - 1)))
