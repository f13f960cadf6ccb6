"""The networks of XMC-GAN: a generator with attentional self-modulation, and a discriminator that encodes images.

Images are channels-first, [B, 3, S, S], with values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.encoders.checkpoint_files import load_exactly, named_tensors, read_checkpoint
from common.types import PositiveFloat, PositiveInt
from papers.xmc_gan.layers import (
    ConditionalBatchNorm,
    DoublingConv,
    SpectralConv,
    SpectralLinear,
    enlarge,
    initialize,
)

#: Side of the generator's first map and of the discriminator's last map.
SMALLEST = 4


def map_sides(channels: Sequence[int], cond_size: int) -> list[int]:
    """Return the sides of a network's maps, from 4 pixels up to the image; `cond_size` must be one of them."""
    sides = [SMALLEST * 2**level for level in range(len(channels))]
    if cond_size not in sides:
        raise ValueError(f"cond_size is {cond_size}, but with these channels it must be one of {sides}")
    return sides


class Captions(NamedTuple):
    """Text of a batch: word vectors [B, T, E], sentence vectors [B, E], and number of valid words [B]."""

    words: Tensor
    sentence: Tensor
    length: Tensor


def normalize(x: Tensor) -> Tensor:
    """Divide x by its length along the last dimension; zero vectors stay zero, with a finite gradient.

    Source: [3.4].
    """
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True).clamp(min=1e-12))


def noise_of(index: Tensor, size: int, seed: int) -> Tensor:
    """Draw noise [B, size] for samples [B]. It depends only on the seed and the sample, not on process and batch."""
    rows = [np.random.default_rng((seed, number)).standard_normal(size, dtype=np.float32) for number in index.tolist()]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, size)


# -- generator ---------------------------------------------------------------------------------------------------------


class GeneratorBlock(nn.Module):
    """Residual block that doubles the resolution. The condition is a map if `spatial`, else a vector.

    Shapes:
        x [B, inputs, H, W] -> [B, outputs, 2 H, 2 W]

    Source: [3.2] and [3.6].
    """

    def __init__(self, inputs: int, outputs: int, conditions: int, spatial: bool, group: int | None = None) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(inputs, conditions, spatial, group)
        self.conv1 = DoublingConv(inputs, outputs)
        self.norm2 = ConditionalBatchNorm(outputs, conditions, spatial, group)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x, condition)))
        h = self.conv2(F.relu(self.norm2(h, condition)))
        return h + enlarge(self.shortcut(x), 2)


class Generator(nn.Module):
    """Generates an image from noise, a sentence vector and word vectors.

    The blocks below `cond_size` are conditioned on a vector of noise and sentence. At `cond_size`, every place attends
    to the words; later blocks are also conditioned on the result at each place.

    Args:
        width: ch; every number of channels is a multiple of it.
        channels: multiples at 4x4 pixels and after every block; each block doubles the side.
        cond_size: side of the map that attends to the words.
        z_dim: width of the noise, and of the projected sentence.
        embedding_dim: E, the width of word and sentence vectors.
        batch_norm_group: size of the groups of images normalized together; null for the whole batch. A group may span
            devices.

    Source: [3].
    """

    def __init__(
        self,
        width: PositiveInt = 96,
        channels: Sequence[PositiveInt] = (16, 16, 8, 8, 4, 2, 1),
        cond_size: PositiveInt = 16,
        z_dim: PositiveInt = 128,
        embedding_dim: PositiveInt = 768,
        gamma: PositiveFloat = 15.0,
        batch_norm_group: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.z_dim, self.gamma, self.batch_norm_group = z_dim, gamma, batch_norm_group
        sides = map_sides(channels, cond_size)
        self.image_size = sides[-1]
        widths = [width * multiple for multiple in channels]
        vector, places = 2 * z_dim, 2 * z_dim + embedding_dim
        self.sentence = nn.Linear(embedding_dim, z_dim)
        self.start = nn.Linear(z_dim, SMALLEST**2 * widths[0])
        attending = sides.index(cond_size)
        blocks = [
            GeneratorBlock(
                inputs, outputs, places if side >= cond_size else vector, side >= cond_size, batch_norm_group
            )
            for side, inputs, outputs in zip(sides, widths, widths[1:])
        ]
        self.blocks = nn.ModuleList(blocks[:attending])
        self.query = nn.Conv2d(widths[attending], embedding_dim, 1)
        self.spatial_blocks = nn.ModuleList(blocks[attending:])
        self.norm = ConditionalBatchNorm(widths[-1], places, spatial=True, group=batch_norm_group)
        self.image = nn.Conv2d(widths[-1], 3, 3, padding=1)
        initialize(self)

    def forward(self, z: Tensor, words: Tensor, sentence: Tensor, length: Tensor) -> Tensor:
        """Generate images with values in [0, 1] from captions and standard normal `z`; `length` counts valid words.

        Shapes:
            z [B, z_dim], words [B, T, E], sentence [B, E], length [B] -> [B, 3, S, S]
        """
        vector = torch.cat([self.sentence(sentence), z], dim=1)
        # Places come before channels, as in the official code's weights.
        x = self.start(z).unflatten(1, (SMALLEST, SMALLEST, -1)).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x, vector)
        shape = x.shape[-2:]
        words = attend(self.query(x).flatten(2).transpose(1, 2), words, length, self.gamma)
        words = words.transpose(1, 2).unflatten(2, shape)
        condition = torch.cat([words, vector[:, :, None, None].expand(-1, -1, *shape)], dim=1)
        if x.is_contiguous(memory_format=torch.channels_last):
            # `cat` returns channels first, which would change the layout of the scaled maps at every block.
            condition = condition.contiguous(memory_format=torch.channels_last)
        for block in self.spatial_blocks:
            x = block(x, condition)
        # Compute pixels in float32, because half precision has too few shades.
        return (torch.tanh(self.image(F.relu(self.norm(x, condition))).float()) + 1.0) / 2.0


def attend(query: Tensor, words: Tensor, length: Tensor, gamma: float) -> Tensor:
    """Mix the normalized words for every region, weighted by a softmax of cosines times `gamma`, in float32.

    `length` is the number of valid words, at least one.

    Shapes:
        query [B, R, E], words [B, T, E], length [B] -> [B, R, E]

    Source: [3.4].
    """
    with torch.autocast(query.device.type, enabled=False):
        words = normalize(words.float())
        scores = gamma * normalize(query.float()) @ words.transpose(1, 2)
        padded = torch.arange(words.shape[1], device=words.device) >= length[:, None]
        return scores.masked_fill(padded[:, None], -torch.inf).softmax(dim=-1) @ words


# -- discriminator -----------------------------------------------------------------------------------------------------


class DiscriminatorBlock(nn.Module):
    """Residual block that halves or keeps the resolution. The `first` block reads an image, so has no ReLU before it.

    A block that keeps both resolution and channels has an identity shortcut.

    Shapes:
        [B, inputs, H, W] -> [B, outputs, H / 2, W / 2], or [B, outputs, H, W]

    Source: [4.2].
    """

    def __init__(self, inputs: int, outputs: int, first: bool = False, halve: bool = True) -> None:
        super().__init__()
        self.first, self.halve = first, halve
        self.conv1 = SpectralConv(inputs, outputs, 3)
        self.conv2 = SpectralConv(outputs, outputs, 3, halve)
        self.shortcut = SpectralConv(inputs, outputs, 1) if halve or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        x = F.avg_pool2d(x, 2) if self.halve else x
        return h + (x if self.shortcut is None else self.shortcut(x))


class DiscriminatorOutput(NamedTuple):
    """Discriminator outputs for N images and B sentences. Every B images belong to the B sentences, in order.

    Attributes:
        logit: whether each image is real and matches its sentence [N].
        pooled: features of the images [N, P].
        sentence: sentences in the space of `pooled` [B, P].
        regions: features of places in row-major order, in the space of words [N, R, E]; None without a region head.
    """

    logit: Tensor
    pooled: Tensor
    sentence: Tensor
    regions: Tensor | None


class Discriminator(nn.Module):
    """Scores images given sentences, and encodes images and regions for the contrastive losses.

    Args:
        width: ch; every number of channels is a multiple of it.
        channels: multiples after every block; all blocks but the last halve the resolution.
        cond_size: side of the map whose places are compared with words.
        embedding_dim: E, the width of word and sentence vectors.

    Source: [4].
    """

    def __init__(
        self,
        width: PositiveInt = 96,
        channels: Sequence[PositiveInt] = (1, 2, 4, 8, 8, 16, 16),
        cond_size: PositiveInt = 16,
        embedding_dim: PositiveInt = 768,
    ) -> None:
        super().__init__()
        sides = map_sides(channels[:-1], cond_size)  # the last block keeps the resolution
        self.image_size = 2 * sides[-1]
        widths = [width * multiple for multiple in channels]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(inputs, outputs, first=level == 0, halve=level < len(channels) - 1)
            for level, (inputs, outputs) in enumerate(zip([3, *widths], widths))
        )
        self._region_level = sides[::-1].index(cond_size)
        self.regions: SpectralConv | None = SpectralConv(widths[self._region_level], embedding_dim, 1)
        self.logit = SpectralLinear(widths[-1], 1)
        self.sentence = SpectralLinear(embedding_dim, widths[-1])
        initialize(self)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode images [N, 3, S, S] as pooled features [N, P] and features of places [N, R, E]."""
        x, regions = images, None
        for level, block in enumerate(self.blocks):
            x = block(x)
            if level == self._region_level and self.regions is not None:
                regions = self.regions(x).flatten(2).transpose(1, 2)
        return F.relu(x).sum((2, 3)), regions

    def forward(self, images: Tensor, sentence: Tensor) -> DiscriminatorOutput:
        """Score images in [0, 1] given sentences. The images come in blocks of B, each in the order of the sentences.

        Shapes:
            images [k * B, 3, S, S], sentence [B, E]
        """
        pooled, regions = self.features(images)
        condition = self.sentence(sentence)
        repeats = len(images) // len(sentence)
        logit = self.logit(pooled)[:, 0] + (pooled * condition.repeat(repeats, 1)).sum(1)
        return DiscriminatorOutput(logit, pooled, condition, regions)


# -- the frozen network of the loss between images ---------------------------------------------------------------------


class ImageNetFeatures(nn.Module):
    """A frozen torchvision network trained on ImageNet.

    Args:
        network: `resnet50` (the official code) or `vgg19` (the paper's ablation).
        features: always `logits`, all 1000.
        size: side to which images are resized.

    Shapes:
        [B, 3, S, S], values in [0, 1] -> [B, F]

    Source: [5.5].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Literal["resnet50", "vgg19"] = "resnet50",
        features: Literal["logits"] = "logits",
        pretrained: str | None = None,
        size: PositiveInt = 224,
    ) -> None:
        super().__init__()
        import torchvision

        self.pretrained, self.size = pretrained, size
        self.network = getattr(torchvision.models, network)(weights=None)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def load_pretrained(self) -> None:
        if self.pretrained is None:
            return
        field = "model.image_network.pretrained"
        weights = named_tensors(read_checkpoint(self.pretrained, "the weights of torchvision"))
        load_exactly(self.network, weights, f"{field}: {self.pretrained} holds another network")

    def train(self, mode: bool = True) -> ImageNetFeatures:
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        size = (self.size, self.size)
        resized = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return self.network((resized - self.mean) / self.std)
