"""Convert decoded pictures to inputs of an encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from common.data.transforms import CACHED_PIXELS, CROP_TRIES, IMAGENET_MEAN, IMAGENET_STD, Pixels, random_area
from common.types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

Bytes = npt.NDArray[np.uint8]


class _Contrast(ImageEnhance.Contrast):
    """Like `ImageEnhance.Contrast`, with a faster mean: Pillow sums a histogram in Python."""

    def __init__(self, image: Image.Image) -> None:
        gray = int(np.asarray(image.convert("L")).mean() + 0.5)
        self.image, self.degenerate = image, Image.new("RGB", image.size, (gray, gray, gray))


#: The operations of `ImageTransform.jitter` except the hue.
ENHANCERS = (ImageEnhance.Brightness, _Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class ImageTransform:
    """Converts one picture to a normalized tensor. All random numbers come from the generator of the call.

    Training, in this order: random resized crop, color jitter in random order, gray, Gaussian blur, horizontal flip.
    Evaluation: resize, center crop. Training and evaluation divide by 255 and normalize. The operations follow
    torchvision, but work on Pillow's bytes, because torchvision's calls are slow for small pictures. The blur is
    Pillow's, as in MoCo's code. A view always uses the same number of random numbers, so turning one augmentation off
    does not change the others.

    Args:
        crop: side of the result in pixels.
        resize: shorter side before the center crop in evaluation.
        min_area: smallest fraction of the picture that the random crop covers; 1.0 always covers the whole area.
        max_aspect: the random crop's width / height is between 1 / `max_aspect` and `max_aspect`.
        jitter: strengths of brightness, contrast, saturation and hue jitter; 0 turns an operation off.
        jitter_probability: probability of the color jitter.
        grayscale, blur, flip: probability of each operation.
        blur_sigma: range of the blur's standard deviation in pixels of the crop.
        squeeze: evaluation resizes to `resize` x `resize`, ignoring the aspect (VirTex v0.9, with `resize = crop`).
        mean, std: channel statistics, on a scale of 0 to 1.

    Shapes:
        RGB picture -> float32 [3, crop, crop].

    Source: docs/papers/mct.md [7] ("image aug") and [9].
    """

    crop: PositiveInt = 224
    resize: PositiveInt = 256
    min_area: Fraction = 0.2
    max_aspect: PositiveFloat = 4.0 / 3.0
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: Fraction = 0.8
    grayscale: Fraction = 0.2
    blur: Fraction = 0.5
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    flip: Fraction = 0.5
    squeeze: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    training: bool = True

    def __post_init__(self) -> None:
        if self.resize < self.crop:
            raise ValueError(f"resize ({self.resize}) must not be smaller than crop ({self.crop})")

    def with_training(self, training: bool) -> ImageTransform:
        return dataclasses.replace(self, training=training)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> tuple[Tensor, bool]:
        """Return the tensor of an RGB picture, and whether the picture was flipped."""
        draws = self.draw(rng)
        return self.together([image], [draws])[0], self.flips(draws)

    def draw(self, rng: np.random.Generator | None) -> list[float]:
        """Draw all random numbers of a view at once. Each parameter has a fixed position in the list."""
        if not self.training:
            return []
        assert rng is not None
        return rng.random(2 * CROP_TRIES + 15).tolist()

    def flips(self, draws: Sequence[float]) -> bool:
        """Return whether `draws` flip the picture. If so, swap left and right in the captions."""
        return bool(draws) and draws[-9] < self.flip

    def together(self, images: Sequence[Image.Image], draws: Sequence[Sequence[float]]) -> list[Tensor]:
        """Transform several pictures, each with its own list from `draw`. This is faster for small pictures."""
        views = [self._view(image, draw) for image, draw in zip(images, draws)]
        count = max(CACHED_PIXELS // self.crop**2, 1)
        blocks = (views[first : first + count] for first in range(0, len(views), count))
        return list(chain.from_iterable(normalized(np.stack(block), self.mean, self.std) for block in blocks))

    def _view(self, image: Image.Image, draws: Sequence[float]) -> Bytes:
        if not self.training:
            shorter = min(image.size)
            sides = [self.resize if self.squeeze else int(self.resize * side / shorter) for side in image.size]
            image = image.resize((sides[0], sides[1]), Image.Resampling.BILINEAR)
            left, top = (round((side - self.crop) / 2) for side in sides)
            return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))
        order, strengths = draws[-8:-4], draws[-4:]
        jitter, grayscale, blur, sigma = draws[-13:-9]
        left, top, width, height = random_area(image.width, image.height, self.min_area, self.max_aspect, draws)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.crop, self.crop), Image.Resampling.BILINEAR)
        if jitter < self.jitter_probability:
            image = self._jittered(image, order, strengths)
        if grayscale < self.grayscale:
            image = image.convert("L").convert("RGB")
        if blur < self.blur:
            low, high = self.blur_sigma
            image = image.filter(ImageFilter.GaussianBlur(low + sigma * (high - low)))
        return np.asarray(ImageOps.mirror(image) if self.flips(draws) else image)

    def _jittered(self, image: Image.Image, order: Sequence[float], strengths: Sequence[float]) -> Image.Image:
        for operation in sorted(range(4), key=order.__getitem__):
            strength, draw = self.jitter[operation], strengths[operation]
            if strength == 0.0:
                continue
            low, high = (-strength, strength) if operation == 3 else (max(1.0 - strength, 0.0), 1.0 + strength)
            factor = low + draw * (high - low)
            if operation == 3:
                turn = Image.new("HSV", image.size, (int(255 * factor) % 256, 0, 0))
                image = ImageChops.add_modulo(image.convert("HSV"), turn).convert("RGB")
                continue
            image = ENHANCERS[operation](image).enhance(factor)
        return image


@dataclass(frozen=True)
class SquashTransform:
    """Squashes an RGB picture to float32 [3, size, size] in [0, 1] and flips it.

    Resizes bilinearly without antialiasing, as TensorFlow does by default.

    Source: docs/papers/xmc_gan.md [7] ("image path").
    """

    size: int = 256
    flip: float = 0.5
    flip_evaluation: float = 0.0
    training: bool = True

    def with_training(self, training: bool) -> SquashTransform:
        return dataclasses.replace(self, training=training)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> tuple[Tensor, bool]:
        draws = self.draw(rng)
        return self.together([image], [draws])[0], self.flips(draws)

    def draw(self, rng: np.random.Generator | None) -> list[float]:
        return [] if rng is None else [rng.random()]

    def flips(self, draws: Sequence[float]) -> bool:
        return bool(draws) and draws[0] < (self.flip if self.training else self.flip_evaluation)

    def together(self, images: Sequence[Image.Image], draws: Sequence[Sequence[float]]) -> list[Tensor]:
        return [
            self._squashed(ImageOps.mirror(image) if self.flips(draw) else image) for image, draw in zip(images, draws)
        ]

    def _squashed(self, image: Image.Image) -> Tensor:
        planes = torch.from_numpy(_planes(np.asarray(image)))
        if image.size != (self.size, self.size):
            planes = F.interpolate(planes[None], (self.size, self.size), mode="bilinear")[0]
        return planes.clamp_(0.0, 1.0)


def normalized(images: Bytes, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert pictures [..., H, W, 3] to normalized float32 [..., 3, H, W].

    torchvision's `to_dtype` (v2) multiplies by 1 / 255, which rounds differently from the published code.
    """
    planes = _planes(images)
    planes -= np.asarray(mean, np.float32)[:, None, None]
    planes /= np.asarray(std, np.float32)[:, None, None]
    return torch.from_numpy(planes)


def _planes(images: Bytes) -> Pixels:
    """Convert pictures [..., H, W, 3] to float32 [..., 3, H, W] in [0, 1]."""
    channels_first = np.ascontiguousarray(np.moveaxis(images, -1, -3))
    return np.divide(channels_first, 255.0, dtype=np.float32)
