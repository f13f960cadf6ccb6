"""CNN14 of PANNs: the audio classifier with public weights for AudioSet's 527 classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.types import Fraction, PositiveInt


class PairedConvolutions(nn.Module):
    """Two 3x3 convolutions with batch normalization and ReLU, then a mean pool over squares of `pool`."""

    #: See `common.training.switches.blocks_of`.
    repeats = True

    def __init__(self, in_channels: int, out_channels: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.pool = pool
        for convolution in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(convolution.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, T, F] -> [B, out, T / pool, F / pool]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(x, self.pool) if self.pool > 1 else x


class PANNsCNN14(nn.Module):
    """Convolutional network on log-mel spectrograms with the parameter names of the released PANNs weights.

    The last block does not pool. The network averages over frequency, then adds the maximum and the mean over time. It
    has 79,673,792 parameters without the classifier `fc_audioset`, and 80,753,615 with it.

    Args:
        mel_bins: number of mel bands. Batch normalization treats each band separately.
        hidden_dim: number of features after the last linear layer; by default, the width of the last block.
        dropout: dropout rate after every block. The linear layer uses 2.5 times the rate, at most 1. The released
            network uses 0.2 and 0.5.

    Shapes:
        [B, 1, T, mel_bins] in decibels -> [B, feature_dim]; T >= 2 ** (len(channels) - 1).

    Examples:
        >>> PANNsCNN14(channels=(8, 16, 32))(torch.randn(2, 1, 64, 64)).shape
        torch.Size([2, 32])

    Source: docs/papers/vx2text.md [3].
    """

    def __init__(
        self,
        channels: Sequence[PositiveInt] = (64, 128, 256, 512, 1024, 2048),
        mel_bins: PositiveInt = 64,
        hidden_dim: PositiveInt | None = None,
        dropout: Fraction = 0.2,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.bn0 = nn.BatchNorm2d(mel_bins)
        width, last = 1, len(channels)
        self.blocks = last
        for number, wide in enumerate(channels, start=1):
            self.add_module(f"conv_block{number}", PairedConvolutions(width, wide, 1 if number == last else 2))
            width = wide
        self.fc1 = nn.Linear(width, hidden_dim or width)
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.zeros_(self.fc1.bias)
        self.feature_dim = hidden_dim or width

    def forward(self, audio: Tensor) -> Tensor:
        x = self.bn0(audio.transpose(1, 3)).transpose(1, 3)
        for number in range(1, self.blocks + 1):
            x = self.get_submodule(f"conv_block{number}")(x)
            x = F.dropout(x, self.dropout, self.training)
        x = x.mean(3)
        x = x.amax(2) + x.mean(2)
        x = F.dropout(x, min(2.5 * self.dropout, 1.0), self.training)
        return torch.relu(self.fc1(x))  # the released classifier has no dropout after this
