"""Networks of XMC-GAN: the generator with attentional self-modulation, and the discriminator that encodes images.

Images are channels-first. Convolutions are arranged for speed, with the results of the order in the specification: 1x1
convolutions commute with a change of resolution, so they are done where the maps are small, and a 3x3 convolution next
to such a change becomes one convolution of 4x4 with stride 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.encoders.checkpoint_files import CheckpointError, differences, named_tensors, read_checkpoint
from common.memory.collective import sum_with_gradient, world_size

#: Side of the map that a generator starts from and a discriminator ends with.
FIRST_SIDE = 4


def image_side(channels: Sequence[int]) -> int:
    """Side of the images of a network with these channels, one entry for each resolution from 4 pixels on."""
    return FIRST_SIDE * 2 ** (len(channels) - 1)


def require_positive(network: str, **sizes: float) -> None:
    """Refuse sizes of a network that are not above 0.

    Raises:
        ValueError: one is not, by its field.
    """
    for name, size in sizes.items():
        if size <= 0:
            raise ValueError(f"model.{network}.{name} is {size}: it must be positive")


class Captions(NamedTuple):
    """Text of a batch: word vectors [B, T, E], sentence vectors [B, E], and how many words count [B]."""

    words: Tensor
    sentence: Tensor
    length: Tensor


def normalize(x: Tensor) -> Tensor:
    """x divided by its length along the last dimension; a vector of zeros stays zero, also in its gradient.

    Source: specification 3.4.
    """
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True).clamp(min=1e-12))


def noise_of(index: Tensor, size: int, seed: int) -> Tensor:
    """Noise [B, size] of samples [B]: a function of seed and sample alone, whatever process and batch they are in."""
    rows = [np.random.default_rng((seed, number)).standard_normal(size, dtype=np.float32) for number in index.tolist()]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, size)


# -- normalization -----------------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """Batch normalization without weights of its own, whose running variance is the biased one.

    Args:
        channels: of the maps.
        synchronized: normalize by the statistics of all ranks' batches together.

    Attributes:
        updating: whether training moves the running statistics; see `keeping_statistics`.

    Shapes:
        [B, C, H, W] -> [B, C, H, W]

    Source: specification 3.3 and 6.4.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, channels: int, synchronized: bool = False) -> None:
        super().__init__()
        self.synchronized = synchronized
        self.momentum, self.epsilon = 0.1, 1e-5
        self.updating = True
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_variance, eps=self.epsilon)
        if self.synchronized and world_size() > 1:
            return self._over_all_ranks(x)
        if not self.updating:
            return F.batch_norm(x, None, None, training=True, eps=self.epsilon)
        # Into copies, since its backward pass would object to a change of what it was given.
        mean, variance = self.running_mean.clone(), self.running_variance.clone()
        y = F.batch_norm(x, mean, variance, training=True, momentum=self.momentum, eps=self.epsilon)
        count = x.numel() // x.shape[1]
        # PyTorch has added the unbiased variance, which is count / (count - 1) times the biased one.
        kept = self.running_variance * (1.0 - self.momentum)
        self.running_variance.copy_(kept + (variance - kept) * ((count - 1) / count))
        self.running_mean.copy_(mean)
        return y

    def _over_all_ranks(self, x: Tensor) -> Tensor:
        wide = x.float()
        count = wide.numel() // wide.shape[1] * world_size()
        sums = sum_with_gradient(torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]))
        mean, square = sums / count
        variance = (square - mean.square()).clamp(min=0.0)
        if self.updating:
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_variance.lerp_(variance.detach(), self.momentum)
        scale = torch.rsqrt(variance + self.epsilon)[:, None, None]
        return ((wide - mean[:, None, None]) * scale).to(x.dtype)


@contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
    """While it lasts, batches are normalized as in training, but the running statistics stay as they are.

    Source: specification 6.1: the images of a step of the discriminator alone do not count.
    """
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.updating = False
    try:
        yield
    finally:
        for norm in norms:
            norm.updating = True


def _two_layers_in_one(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Initialize each half of a layer, which computes scale and shift, as a layer of its own."""
    for half in layer.weight.chunk(2):
        nn.init.xavier_normal_(half)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class ConditionalBatchNorm(nn.Module):
    """Batch normalization whose scale and shift are computed from a vector: BN(x) * (1 + gamma(c)) + beta(c).

    Args:
        channels: of the maps.
        conditions: width of the vector.
        synchronized: see `BatchNorm`.

    Shapes:
        x [B, C, H, W], condition [B, K] -> [B, C, H, W]

    Source: specification 3.3.
    """

    def __init__(self, channels: int, conditions: int, synchronized: bool = False) -> None:
        super().__init__()
        self.norm = BatchNorm(channels, synchronized)
        self.modulation = _two_layers_in_one(nn.Linear(conditions, 2 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(beta, self.norm(x), 1.0 + gamma)


class SpatialConditionalBatchNorm(nn.Module):
    """Batch normalization whose scale and shift are computed at every place from a map of conditions.

    The map may be smaller than x by a whole factor: scale and shift of a place are then those of the nearest place of
    the map, as if the map had been enlarged first.

    Args:
        channels: of the maps.
        conditions: channels of the conditions.
        synchronized: see `BatchNorm`.

    Shapes:
        x [B, C, k * h, k * w], condition [B, K, h, w] -> [B, C, k * h, k * w]

    Source: specification 3.6 and the speed-up of 3.7.
    """

    def __init__(self, channels: int, conditions: int, synchronized: bool = False) -> None:
        super().__init__()
        self.norm = BatchNorm(channels, synchronized)
        self.modulation = _two_layers_in_one(nn.Conv2d(conditions, 2 * channels, 1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.modulation(condition)
        if modulation.shape[-2:] != x.shape[-2:]:
            modulation = F.interpolate(modulation, x.shape[-2:], mode="nearest")
        gamma, beta = modulation.chunk(2, dim=1)
        return torch.addcmul(beta, self.norm(x), 1.0 + gamma)


# -- convolutions that change the resolution ---------------------------------------------------------------------------


def convolve_then_halve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution and then the mean of every 2x2 places, as one convolution with 4/9 of the products.

    Shapes:
        x [B, inputs, H, W], weight [outputs, inputs, 3, 3] -> [B, outputs, H / 2, W / 2]
    """
    return F.conv2d(x, _means_of_shifts(weight), bias, stride=2, padding=1)


def double_then_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every place repeated 2x2 times and then a 3x3 convolution, as one transposed one with 4/9 of the products.

    Shapes:
        x [B, inputs, H, W], weight [outputs, inputs, 3, 3] -> [B, outputs, 2 H, 2 W]
    """
    return F.conv_transpose2d(x, 4.0 * _means_of_shifts(weight).flip(2, 3).transpose(0, 1), bias, stride=2, padding=1)


def _means_of_shifts(weight: Tensor) -> Tensor:
    """The mean of a 3x3 kernel shifted by 0 or 1 in both directions, [..., 4, 4]."""
    return F.avg_pool2d(F.pad(weight, (1, 1, 1, 1)), 2, stride=1)


class DoublingConv(nn.Conv2d):
    """Nearest enlargement by 2 and a 3x3 convolution; see `double_then_convolve`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return double_then_convolve(x, self.weight, self.bias)


# -- generator ---------------------------------------------------------------------------------------------------------


class GeneratorBlock(nn.Module):
    """Residual block that doubles the resolution.

    Args:
        inputs, outputs: channels.
        conditions: width of the condition of its two normalizations.
        spatial: whether these see a map of conditions or one vector.
        synchronized: see `BatchNorm`.

    Shapes:
        x [B, inputs, H, W] -> [B, outputs, 2 H, 2 W]

    Source: specification 3.2 and 3.6.
    """

    def __init__(self, inputs: int, outputs: int, conditions: int, spatial: bool, synchronized: bool = False) -> None:
        super().__init__()
        norm = SpatialConditionalBatchNorm if spatial else ConditionalBatchNorm
        self.norm1 = norm(inputs, conditions, synchronized)
        self.conv1 = DoublingConv(inputs, outputs)
        self.norm2 = norm(outputs, conditions, synchronized)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x, condition)))
        h = self.conv2(F.relu(self.norm2(h, condition)))
        return h + F.interpolate(self.shortcut(x), scale_factor=2.0, mode="nearest")


class Generator(nn.Module):
    """Image from noise, a sentence vector and word vectors.

    Blocks below `cond_size` see one vector of noise and sentence. At `cond_size` every place attends to the words; from
    there on the blocks see at each place the words that it attended to, beside that vector.

    Args:
        width: channels are multiples of it (ch).
        channels: multiples at 4x4 pixels and after every block; each block doubles the side.
        cond_size: side of the map that attends to the words.
        z_dim: width of the noise, and of the sentence after its projection.
        embedding_dim: width of word and sentence vectors (E).
        gamma: sharpness of the attention.
        batch_norm: over the batch of one device (`local`) or of all (`sync`).

    Raises:
        ValueError: a size is below 1, or `cond_size` is not the side of one of the maps.

    Source: specification 3.
    """

    def __init__(
        self,
        width: int = 96,
        channels: Sequence[int] = (16, 16, 8, 8, 4, 2, 1),
        cond_size: int = 16,
        z_dim: int = 128,
        embedding_dim: int = 768,
        gamma: float = 15.0,
        batch_norm: Literal["local", "sync"] = "local",
    ) -> None:
        super().__init__()
        require_positive("generator", width=width, z_dim=z_dim, embedding_dim=embedding_dim, gamma=gamma)
        self.z_dim, self.gamma = z_dim, gamma
        self.image_size = image_side(channels)
        sides = [FIRST_SIDE * 2**level for level in range(len(channels))]
        if cond_size not in sides:
            raise ValueError(f"generator.cond_size is {cond_size}, the maps of these channels have sides {sides}")
        synchronized = batch_norm == "sync"
        widths = [width * multiple for multiple in channels]
        vector, places = 2 * z_dim, 2 * z_dim + embedding_dim
        self.sentence = nn.Linear(embedding_dim, z_dim)
        self.start = nn.Linear(z_dim, FIRST_SIDE**2 * widths[0])
        blocks = [
            GeneratorBlock(inputs, outputs, places if side >= cond_size else vector, side >= cond_size, synchronized)
            for side, inputs, outputs in zip(sides, widths, widths[1:])
        ]
        self.blocks = nn.ModuleList(blocks[: sides.index(cond_size)])
        self.query = nn.Conv2d(widths[sides.index(cond_size)], embedding_dim, 1)
        self.spatial_blocks = nn.ModuleList(blocks[sides.index(cond_size) :])
        self.norm = SpatialConditionalBatchNorm(widths[-1], places, synchronized)
        self.image = nn.Conv2d(widths[-1], 3, 3, padding=1)
        initialize(self)

    def forward(self, z: Tensor, words: Tensor, sentence: Tensor, length: Tensor) -> Tensor:
        """Images of captions.

        Args:
            z: noise from a standard normal distribution.
            words: vectors of the words, padded.
            sentence: one vector for each caption.
            length: number of words that count.

        Shapes:
            z [B, z_dim], words [B, T, E], sentence [B, E], length [B] -> [B, 3, S, S]

        Returns:
            Images, values in [0, 1].
        """
        x, vector = self.up_to_attention(z, sentence)
        context, _ = self.attend(x, words, length)
        side = x.shape[-1]
        condition = torch.cat([context, vector[:, :, None, None].expand(-1, -1, side, side)], dim=1)
        for block in self.spatial_blocks:
            x = block(x, condition)
        # In float32, or half precision would leave too few shades.
        return (torch.tanh(self.image(F.relu(self.norm(x, condition))).float()) + 1.0) / 2.0

    def attention(self, z: Tensor, words: Tensor, sentence: Tensor, length: Tensor) -> Tensor:
        """How much every place attends to each word, [B, T, cond_size, cond_size]; sums to 1 over the words."""
        x, _ = self.up_to_attention(z, sentence)
        return self.attend(x, words, length)[1]

    def up_to_attention(self, z: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """The map that attends to the words [B, C, cond_size, cond_size], and the vector of noise and sentence."""
        vector = torch.cat([self.sentence(sentence), z], dim=1)
        # Places before channels, as in the official code, so that its weights fit.
        x = self.start(z).unflatten(1, (FIRST_SIDE, FIRST_SIDE, -1)).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x, vector)
        return x, vector

    def attend(self, x: Tensor, words: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """What each place attends to among the words [B, E, h, w], and how much to each of them [B, T, h, w]."""
        query = self.query(x)
        context, weights = attend(query.flatten(2).transpose(1, 2), words, length, self.gamma)
        shape = query.shape[-2:]
        return context.transpose(1, 2).unflatten(2, shape), weights.transpose(1, 2).unflatten(2, shape)


def attend(query: Tensor, words: Tensor, length: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """Attention of regions over words: a softmax of scaled cosines, over normalized words.

    Args:
        query: of the regions.
        words: vectors of the words, padded.
        length: number of words that count, at least one; None when all do.
        gamma: sharpness.

    Shapes:
        query [B, R, E], words [B, T, E], length [B] -> [B, R, E], [B, R, T]

    Returns:
        Mixes of normalized words, and their weights; computed in float32.

    Source: specification 3.4.
    """
    with torch.autocast(query.device.type, enabled=False):
        words = normalize(words.float())
        scores = gamma * normalize(query.float()) @ words.transpose(1, 2)
        if length is not None:
            padded = torch.arange(words.shape[1], device=words.device) >= length[:, None]
            scores = scores.masked_fill(padded[:, None], -torch.inf)
        weights = scores.softmax(dim=-1)
        return weights @ words, weights


def initialize(network: nn.Module) -> None:
    """Glorot's normal weights and no biases for every layer but those that compute a scale and a shift."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not name.endswith("modulation"):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# -- discriminator -----------------------------------------------------------------------------------------------------


class _SpectralNorm:
    """A weight divided by an estimate of its largest singular value, one step of power iteration at every pass.

    The step is also made in evaluation, where its result is not kept. PyTorch's own version makes none there and takes
    another epsilon.

    Source: specification 4.1.
    """

    weight: Tensor
    u: Tensor
    training: bool

    def normalized_weight(self) -> Tensor:
        """The weight [out, ...] divided by its singular value."""
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            with torch.no_grad():
                v = _unit(self.u @ matrix)
                u = _unit(matrix @ v)
                if self.training:
                    self.u.copy_(u)
            sigma = u @ (matrix @ v)
            return self.weight / (sigma + 1e-10)


def _unit(vector: Tensor) -> Tensor:
    return vector * torch.rsqrt(vector.square().sum() + 1e-10)


class SpectralLinear(_SpectralNorm, nn.Linear):
    """Linear layer with spectral normalization; see `_SpectralNorm`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        nn.Linear.__init__(self, inputs, outputs)
        self.register_buffer("u", 0.01 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized_weight(), self.bias)


class SpectralConv(_SpectralNorm, nn.Conv2d):
    """Convolution with spectral normalization; see `_SpectralNorm`.

    Args:
        inputs, outputs: channels.
        kernel: its side.
        halve: take the mean of every 2x2 places afterwards; for a kernel of 3.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, halve: bool = False) -> None:
        nn.Conv2d.__init__(self, inputs, outputs, kernel, padding=kernel // 2)
        self.halve = halve
        self.register_buffer("u", 0.01 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.halve:
            return convolve_then_halve(x, self.normalized_weight(), self.bias)
        return F.conv2d(x, self.normalized_weight(), self.bias, padding=self.padding)


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the resolution or keeps it.

    Args:
        inputs, outputs: channels.
        first: its input is an image, to which no ReLU is applied.
        halve: whether the resolution shrinks; a block that keeps it and its channels adds its input as it is.

    Shapes:
        [B, inputs, H, W] -> [B, outputs, H / 2, W / 2], or [B, outputs, H, W]

    Source: specification 4.2.
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
    """What the discriminator makes of N images and the B sentences that they repeat.

    Attributes:
        logit: how real an image of its sentence each one is [N].
        pooled: features of the images [N, P].
        sentence: the sentences in the space of `pooled` [B, P].
        regions: features of places, row by row, in the space of words [N, R, E]; None without a region head.
    """

    logit: Tensor
    pooled: Tensor
    sentence: Tensor
    regions: Tensor | None


class Discriminator(nn.Module):
    """Scores images under sentences, and encodes images and regions for the contrastive losses.

    Args:
        width: channels are multiples of it (ch).
        channels: multiples after every block; all but the last halve the resolution.
        cond_size: side of the map whose places are compared with words.
        embedding_dim: width of word and sentence vectors (E).

    Raises:
        ValueError: a size is below 1, or `cond_size` is not the side of one of the maps.

    Source: specification 4.
    """

    def __init__(
        self,
        width: int = 96,
        channels: Sequence[int] = (1, 2, 4, 8, 8, 16, 16),
        cond_size: int = 16,
        embedding_dim: int = 768,
    ) -> None:
        super().__init__()
        require_positive("discriminator", width=width, embedding_dim=embedding_dim)
        self.image_size = image_side(channels)
        sides = [self.image_size // 2 ** (level + 1) for level in range(len(channels) - 1)]
        if cond_size not in sides:
            raise ValueError(f"discriminator.cond_size is {cond_size}, the maps of these channels have sides {sides}")
        widths = [width * multiple for multiple in channels]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(inputs, outputs, first=level == 0, halve=level < len(channels) - 1)
            for level, (inputs, outputs) in enumerate(zip([3, *widths], widths))
        )
        self._region_level = sides.index(cond_size)
        self.regions: SpectralConv | None = SpectralConv(widths[self._region_level], embedding_dim, 1)
        self.logit = SpectralLinear(widths[-1], 1)
        self.sentence = SpectralLinear(embedding_dim, widths[-1])
        initialize(self)

    def drop_region_head(self) -> None:
        """Leave out what only the losses of words need."""
        self.regions = None

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of images [N, 3, S, S], as a whole [N, P] and of their places [N, R, E]."""
        x, regions = images, None
        for level, block in enumerate(self.blocks):
            x = block(x)
            if level == self._region_level and self.regions is not None:
                regions = self.regions(x).flatten(2).transpose(1, 2)
        return F.relu(x).sum((2, 3)), regions

    def forward(self, images: Tensor, sentence: Tensor) -> DiscriminatorOutput:
        """Score images under sentences.

        Args:
            images: values in [0, 1]; all images of the sentences once, then all of them again (real, then generated).
            sentence: vectors of the sentences.

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
    """A network trained on ImageNet, as torchvision builds it; never trained here.

    Args:
        network: `resnet50` (the official code) or `vgg19` (the paper's ablation).
        features: its 1000 `logits`, or what goes into its last layer (`pooled`).
        pretrained: file of torchvision's weights; None keeps random ones.
        size: side to which images are resized.

    Shapes:
        [B, 3, S, S], values in [0, 1] -> [B, F]

    Source: specification 5.5.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Literal["resnet50", "vgg19"] = "resnet50",
        features: Literal["logits", "pooled"] = "logits",
        pretrained: str | None = None,
        size: int = 224,
    ) -> None:
        super().__init__()
        import torchvision

        self.pretrained, self.size = pretrained, size
        self.network = getattr(torchvision.models, network)(weights=None)
        self._last = "fc" if network == "resnet50" else "classifier.6"
        self._pooled = features == "pooled"
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def load_pretrained(self) -> None:
        """Read the weights.

        Raises:
            CheckpointError: the file is missing or of another network.
        """
        if self.pretrained is None:
            return
        field = "model.image_network.pretrained"
        path = Path(self.pretrained)
        if not path.is_file():
            raise CheckpointError(
                f"{field}: {path} does not exist. Nothing is downloaded: put torchvision's weights there, or set "
                "model.weight_image_net to 0"
            )
        found = named_tensors(read_checkpoint(path, "the weights of torchvision"))
        problem = differences(self.network.state_dict(), found)
        if problem:
            raise CheckpointError(f"{field}: {path} holds another network: {problem}")
        self.network.load_state_dict(found)

    def train(self, mode: bool = True) -> ImageNetFeatures:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        size = (self.size, self.size)
        resized = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        normalized = (resized - self.mean) / self.std
        if not self._pooled:
            return self.network(normalized)
        seen: list[Tensor] = []
        hook = self.network.get_submodule(self._last).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        try:
            self.network(normalized)
        finally:
            hook.remove()
        return seen[0]
