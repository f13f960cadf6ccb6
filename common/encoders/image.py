"""Image encoders: a ResNet with torchvision's and timm's parameter names, and any network of timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from torch import Tensor, nn

from common.types import PositiveInt


class ImageResNet(nn.Module):
    """timm's residual network without its classifier; ResNet-50 by default.

    Parameter names equal torchvision's (`conv1`, `layer1.0.conv1`, `layer1.0.downsample.0`). So torchvision, timm,
    MoCo, VirTex and this suite can load each other's weights without renaming.

    Args:
        layers: number of blocks in each of the four stages.
        bottleneck: use blocks of three convolutions that output four times the channels (ResNet-50). False: two
            convolutions.
        channels: number of channels in each stage, before a bottleneck expands them.
        stem_pool: halve the resolution once more before the first stage.
        zero_init_residual: start every block as the identity, like VirTex and unlike MoCo.

    Shapes:
        [B, 3, H, W] -> [B, feature_dim]; 2048 features for ResNet-50.

    Examples:
        >>> ImageResNet()(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 2048])

    Source: docs/papers/mct.md [7]: torchvision's resnet50 from random weights.
    """

    def __init__(
        self,
        layers: Sequence[PositiveInt] = (3, 4, 6, 3),
        bottleneck: bool = True,
        channels: Sequence[PositiveInt] = (64, 128, 256, 512),
        stem_channels: PositiveInt = 64,
        stem_kernel: PositiveInt = 7,
        stem_stride: PositiveInt = 2,
        stem_pool: bool = True,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if len(layers) != 4 or len(channels) != 4:
            raise ValueError(f"layers and channels need four entries each, got {list(layers)} and {list(channels)}")
        block: Any = Bottleneck if bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(3, stem_channels, stem_kernel, stem_stride, stem_kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem_pool else nn.Identity()
        stages, _ = make_blocks(
            (block,) * 4, tuple(channels), tuple(layers), stem_channels, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d
        )
        self.layer1, self.layer2, self.layer3, self.layer4 = (stage for _, stage in stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, Bottleneck | BasicBlock):
                module.zero_init_last()
        expansion = 4 if bottleneck else 1
        self.stage_channels = {f"res{number}": width * expansion for number, width in enumerate(channels, start=2)}
        self.feature_dim = self.stage_channels["res5"]

    def stem(self, images: Tensor) -> Tensor:
        """Compute the input of the first stage, [B, stem_channels, H / 4, W / 4] by default."""
        return self.maxpool(self.act1(self.bn1(self.conv1(images))))

    def forward_map(self, images: Tensor) -> Tensor:
        """Compute the feature map of the last stage, [B, feature_dim, h, w]. For images of 224 pixels, h = w = 7."""
        return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))

    def forward(self, images: Tensor) -> Tensor:
        """Average the last feature map over all positions, [B, feature_dim]."""
        return self.forward_map(images).mean((2, 3))


def timm_encoder(name: str, options: dict[str, Any] | None = None) -> nn.Module:
    """Build a timm network with random weights and without the classifier. Downloads nothing.

    `load_encoder` reads timm's weights with the prefix `""`. A convolutional network also has `forward_map`, which
    returns the last feature map.

    Args:
        name: see `timm.list_models()`.
        options: further arguments of `timm.create_model`, such as `{img_size: 64}` for a transformer.

    Examples:
        >>> timm_encoder("resnet18")(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 512])
    """
    encoder: Any = timm.create_model(name, pretrained=False, num_classes=0, **(options or {}))
    encoder.feature_dim = encoder.head_hidden_size
    encoder.forward_map = encoder.forward_features
    return encoder
