"""Convert decoded frames and samples to inputs of an encoder. Also holds clip settings and sound statistics."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.media import frame_count
from common.encoders.checkpoint_files import read_checkpoint
from common.errors import StageError
from common.files import open_regular, parsing, write_atomically
from common.types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_TRIES = 10
#: So many pixels and samples fit, with their temporary values, into a core's cache.
CACHED_PIXELS, CACHED_SAMPLES = 2**15, 2**16
#: Clip the spectrogram this many decibels below its maximum.
DYNAMIC_RANGE = 100.0
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

Pixels = npt.NDArray[np.float32]


def random_area(
    width: int, height: int, min_area: float, max_aspect: float, draws: Sequence[float]
) -> tuple[int, int, int, int]:
    """Choose left, top, width and height of a random resized crop. After ten failed tries, use the largest center crop.

    The area is uniform in [`min_area`, 1], and the aspect log-uniform in [1 / `max_aspect`, `max_aspect`]. `draws`
    holds uniform numbers in [0, 1): area and aspect for each try, then x and y.
    """
    bound = math.log(max_aspect)
    for attempt in range(CROP_TRIES):
        area = width * height * (min_area + draws[2 * attempt] * (1.0 - min_area))
        aspect = math.exp((2.0 * draws[2 * attempt + 1] - 1.0) * bound)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(draws[2 * CROP_TRIES] * (width - crop_width + 1))
            top = int(draws[2 * CROP_TRIES + 1] * (height - crop_height + 1))
            return left, top, crop_width, crop_height
    crop_width = min(width, round(height * max_aspect))
    crop_height = min(height, round(width * max_aspect))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


@dataclass(frozen=True)
class VideoTransform:
    """Converts the frames of a clip to a normalized tensor. All frames of a clip share the random parameters.

    Training: random resized crop ("msc") or resize and random crop ("crop"), horizontal flip, color jitter. Evaluation:
    resize and center crop. Training and evaluation divide by 255, normalize, and repeat short clips. Resizing is within
    one gray level of Pillow's bilinear filter. We don't use `torchvision.transforms.v2`: it draws from one global
    generator, resizes like Pillow only with AVX2, converts to gray differently (weight 0.2989, not 0.299) and shifts
    the hue seven times slower.

    Args:
        frames: minimum number of frames in the result. 0 lets the data set choose.
        resize: shorter side before a plain crop.
        keep_aspect: False squeezes the frames to `resize` x `resize`, as the official "crop" mode does.
        min_area: smallest fraction of the frame that "msc" crops.
        jitter: strengths of brightness, contrast, saturation and hue jitter; 0 turns an operation off.
        normalize: False returns bytes; call `normalized` later, for example on a GPU.

    Shapes:
        frames uint8 [T, H, W, 3] -> float32 [3, frames, crop, crop]; uint8 without `normalize`.

    Source: docs/papers/avid_cma.md [2.2].
    """

    mode: Literal["msc", "crop"] = "msc"
    frames: int = 0
    crop: int = 224
    resize: int = 256
    keep_aspect: bool = True
    min_area: float = 0.08
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.2)
    flip: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    training: bool = True
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.resize < self.crop:
            raise ValueError(f"resize ({self.resize}) must not be smaller than crop ({self.crop})")

    def adapted(self, training: bool, frames: int) -> VideoTransform:
        """Return a copy for training or evaluation, with at least `frames` frames."""
        return dataclasses.replace(self, training=training, frames=max(self.frames, frames))

    def __call__(self, frames: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        return self.together([frames], [self.draw(rng)])[0]

    def draw(self, rng: np.random.Generator | None) -> list[float]:
        """Draw all random numbers of a clip at once. Each parameter has a fixed position in the list."""
        if not self.training:
            return []
        assert rng is not None
        return rng.random(2 * CROP_TRIES + 11).tolist()

    def together(self, clips: Sequence[Tensor], drawn: Sequence[Sequence[float]]) -> list[Tensor]:
        """Transform several clips, each with the result of `draw`. This is faster for small clips."""
        cropped = [self._cropped(frames, draws) for frames, draws in zip(clips, drawn)]
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, (pixels, draws) in enumerate(zip(cropped, drawn)):
            order = sorted(range(4), key=draws[-8:].__getitem__) if draws else []
            alike.setdefault((pixels.shape[1], *(n for n in order if self.jitter[n])), []).append(number)
        results: dict[int, Tensor] = {}
        for (_, *order), numbers in alike.items():
            video = torch.stack([cropped[number] for number in numbers])
            if self.normalize or order:
                video = self._colored(video, order, np.array([drawn[number][-4:] for number in numbers]))
            results |= zip(numbers, video)
        return [results[number] for number in range(len(clips))]

    def _cropped(self, frames: Tensor, draws: Sequence[float]) -> Tensor:
        """Crop, resize, flip and loop bytes, [T, H, W, 3] -> [3, T, crop, crop]."""
        pixels = frames.permute(0, 3, 1, 2)
        if not self.training:
            pixels = self._resized(pixels)
            top, left = (round((side - self.crop) / 2) for side in pixels.shape[-2:])
            pixels = pixels[..., top : top + self.crop, left : left + self.crop]
        elif self.mode == "msc":
            # Swap x and y, because recorded runs draw y first.
            tries, place = draws[: 2 * CROP_TRIES], draws[2 * CROP_TRIES : 2 * CROP_TRIES + 2]
            left, top, width, height = random_area(
                pixels.shape[-1], pixels.shape[-2], self.min_area, 4.0 / 3.0, [*tries, *place[::-1]]
            )
            pixels = _bilinear(pixels[..., top : top + height, left : left + width], (self.crop, self.crop))
        else:
            pixels = self._resized(pixels)
            top, left = (
                min(int(draw * (side - self.crop + 1)), side - self.crop)
                for draw, side in zip(draws[:2], pixels.shape[-2:])
            )
            pixels = pixels[..., top : top + self.crop, left : left + self.crop]
        if draws and draws[-9] < self.flip:
            pixels = pixels.flip(-1)
        length = len(pixels)
        return (pixels if length >= self.frames else pixels[torch.arange(self.frames) % length]).transpose(0, 1)

    def _colored(self, video: Tensor, order: Sequence[int], draws: npt.NDArray[np.float64]) -> Tensor:
        """Jitter the colors of clips [n, 3, T, H, W] with `draws` [n, 4] in the given `order`, then normalize."""
        result = torch.empty(video.shape)
        # Color operations are memory-bound, so process blocks that fit into a core's cache.
        frames = max(CACHED_PIXELS // self.crop**2, 1)
        clips = max(frames // video.shape[2], 1)
        for first in range(0, len(video), clips):
            some = slice(first, first + clips)
            for colors, pixels in zip(result[some].split(frames, 2), video[some].split(frames, 2)):
                colors.copy_(pixels).div_(255.0)
                # For small frames the cost per call dominates, and NumPy's is lower.
                self._jitter(colors.numpy(), order, draws[some])
                self._standardized(colors)
        return result

    def _resized(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        side = self.resize
        if not self.keep_aspect:
            return _bilinear(pixels, (side, side))
        if height <= width:
            return _bilinear(pixels, (side, int(side * width / height)))
        return _bilinear(pixels, (int(side * height / width), side))

    def normalized(self, video: Tensor) -> Tensor:
        """Normalize bytes [..., 3, T, H, W] if `normalize` is off. The result stays on the device of the input."""
        return self._standardized(video.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0))

    def _standardized(self, colors: Tensor) -> Tensor:
        mean, std = (_column(values)[:, None].to(colors.device) for values in (self.mean, self.std))
        return colors.sub_(mean).div_(std)

    def _jitter(self, colors: Pixels, order: Sequence[int], draws: npt.NDArray[np.float64]) -> None:
        for operation in order:
            strength, draw = self.jitter[operation], draws[:, operation, None, None, None, None]
            if operation == 3:
                shift_hue(colors, (2.0 * draw[:, 0] - 1.0) * strength)
                continue
            low = max(1.0 - strength, 0.0)
            factor = (low + draw * (1.0 + strength - low)).astype(np.float32)
            # Brightness blends with black, contrast with the mean gray, saturation with the gray version.
            if operation == 0:
                colors *= factor
            else:
                gray = luma(colors)
                if operation == 1:
                    gray = gray.mean(axis=(-2, -1), keepdims=True)
                colors *= factor
                colors += gray * (np.float32(1.0) - factor)
            np.clip(colors, 0.0, 1.0, out=colors)


@functools.lru_cache(maxsize=16)
def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _bilinear(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    # This filter is within one gray level of Pillow's on bytes, but not on floats.
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)


def luma(colors: Pixels) -> Pixels:
    """Convert to gray, [..., 3, T, H, W] -> [..., 1, T, H, W]."""
    *clips, _, frames, height, width = colors.shape
    return np.matmul(LUMA, colors.reshape(*clips, 3, -1)).reshape(*clips, 1, frames, height, width)


def shift_hue(colors: Pixels, shift: npt.ArrayLike) -> None:
    """Rotate the hue of RGB colors [..., 3, T, H, W] in [0, 1] in place. `shift` is a fraction of the color circle."""
    planes = red, green, blue = np.moveaxis(colors, -4, 0)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    scale = np.reciprocal(np.maximum(chroma, np.float32(1e-12)))
    # Position on the circle in sixths: 0 red, 2 green, 4 blue.
    hue = (red - green) * scale
    hue += np.float32(4.0)
    branch = (blue - red) * scale
    branch += np.float32(2.0)
    np.copyto(hue, branch, where=value == green)
    np.subtract(green, blue, out=branch)
    branch *= scale
    np.copyto(hue, branch, where=value == red)
    hue += (6.0 * np.asarray(shift)).astype(np.float32)
    turns = np.floor(hue * np.float32(1.0 / 6.0))
    turns *= np.float32(6.0)
    hue -= turns
    value -= chroma
    # Each channel is a trapezoid over the circle: 1 up to a sixth from its color, 0 beyond two sixths.
    for plane, center in zip(planes, (3.0, 2.0, 4.0)):
        np.subtract(hue, np.float32(center), out=plane)
        np.abs(plane, out=plane)
        if center == 3.0:
            plane -= np.float32(1.0)
        else:
            np.subtract(np.float32(2.0), plane, out=plane)
        np.clip(plane, 0.0, 1.0, out=plane)
        plane *= chroma
        plane += value


@dataclass(frozen=True)
class AudioTransform:
    """Converts the samples of a clip to a log spectrogram. Frequency bins are linear, not mel.

    Steps: mean over channels, cut or zero-pad at the end, random volume (training), power spectrum with a periodic Hann
    window and reflect padding, averages of two neighboring bins (except bin 0), decibels, normalization per bin.

    Args:
        window: length of a clip in seconds.
        fft: length of the Fourier transform in samples. (`n_fft` in the official configs is half as large.)
        volume: training scales the samples by a factor in [1 - volume, 1 + volume].
        mean, std: statistics in decibels, one per bin, see :func:`write_audio_statistics`. If empty, results stay in
            decibels.

    Shapes:
        samples float32 [N] or [channels, N] -> float32 [1, frames, bins].

    Source: docs/papers/avid_cma.md [2.3].
    """

    sample_rate: int = 24_000
    window: float = 2.0
    fft: int = 1024
    frames_per_second: int = 100
    volume: float = 0.1
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    training: bool = True

    def __post_init__(self) -> None:
        if self.sample_rate % self.frames_per_second or self.fft % 4 or self.num_samples <= self.fft // 2:
            raise ValueError(
                f"sample_rate ({self.sample_rate}) must be a multiple of frames_per_second ({self.frames_per_second}), "
                f"fft ({self.fft}) must be a multiple of 4, and half of fft must be shorter than {self.window} s"
            )
        if len(self.mean) not in (0, self.num_bins):
            raise ValueError(f"got statistics of {len(self.mean)} bins, but fft {self.fft} has {self.num_bins}")

    @property
    def num_bins(self) -> int:
        """Number of bins after averaging pairs of bins. Bin 0 stays alone."""
        return self.fft // 4 + 1

    @property
    def num_samples(self) -> int:
        return int(self.window * self.sample_rate + 1e-6)

    @property
    def num_frames(self) -> int:
        return int(self.window * self.frames_per_second + 1e-6)

    def with_training(self, training: bool) -> AudioTransform:
        return dataclasses.replace(self, training=training)

    def __call__(self, samples: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        return self.together([samples], [self.draw(rng)])[0]

    def draw(self, rng: np.random.Generator | None) -> float:
        """Draw the random number for a clip's volume. 0.5 leaves the volume unchanged."""
        if not self.training or self.volume == 0.0:
            return 0.5
        assert rng is not None
        return rng.random()

    def together(self, sounds: Sequence[Tensor], drawn: Sequence[float]) -> list[Tensor]:
        """Transform several clips, each with the result of `draw`. This is faster for small clips."""
        samples = torch.stack([self.prepare(sound) for sound in sounds])
        if self.training and self.volume > 0.0:
            draws = torch.tensor(drawn, dtype=torch.float64)
            samples *= (1.0 + (2.0 * draws - 1.0) * self.volume).float()[:, None]
        blocks = samples.split(max(CACHED_SAMPLES // self.num_samples, 1))
        decibels = torch.cat([self.decibels(block) for block in blocks])
        if len(self.mean):
            mean, scale = self._of_bins
            decibels.sub_(mean).mul_(scale)
        return list(decibels)

    @functools.cached_property
    def _of_bins(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean), 1.0 / (torch.tensor(self.std) + 1e-5)

    def prepare(self, samples: Tensor) -> Tensor:
        """Mix to mono and cut or zero-pad at the end, [N] or [channels, N] -> [num_samples]."""
        if samples.ndim == 2:
            samples = samples.mean(dim=0)
        return to_length(samples, self.num_samples)

    def decibels(self, samples: Tensor) -> Tensor:
        """Compute the unnormalized log spectrogram, [num_samples] -> [1, frames, bins] or [B, ...] -> [B, 1, ...]."""
        hop = self.sample_rate // self.frames_per_second
        # Use float64: the floor is 100 dB below the maximum, which float32 can't resolve.
        spectrum = torch.stft(samples.double(), self.fft, hop, window=_hann(self.fft), return_complex=True)
        power = spectrum.abs().square()[..., : self.num_frames].float()
        groups = (power[..., 1::2, :] + power[..., 2::2, :]) / 2.0
        pooled = torch.cat([power[..., :1, :], groups], dim=-2).transpose(-2, -1).contiguous().unsqueeze(-3)
        decibels = pooled.clamp_(min=1e-10).log10_().mul_(10.0)
        return torch.maximum(decibels, decibels.amax((-3, -2, -1), keepdim=True) - DYNAMIC_RANGE)


def to_length(samples: Tensor, count: int) -> Tensor:
    """Cut or zero-pad at the end, [N] -> [count]."""
    missing = count - len(samples)
    return F.pad(samples, (0, missing)) if missing > 0 else samples[:count]


@functools.lru_cache(maxsize=4)
def _hann(size: int) -> Tensor:
    return torch.hann_window(size, dtype=torch.float64)


def write_audio_statistics(spectrograms: Iterable[Tensor], path: Path) -> None:
    """Write an .npz file with each bin's `mean` and `std` over spectrograms [..., time, bins] in decibels.

    Source: docs/papers/avid_cma.md [2.3], "Statistics".
    """
    total: Any = 0.0
    squares: Any = 0.0
    count = 0
    for spectrogram in spectrograms:
        values = spectrogram.reshape(-1, spectrogram.shape[-1]).double()
        total = total + values.sum(0).numpy()
        squares = squares + values.square().sum(0).numpy()
        count += len(values)
    if not count:
        raise ValueError("no spectrogram to compute statistics of")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    content = io.BytesIO()
    np.savez(content, mean=mean.astype(np.float32), std=std.astype(np.float32))
    write_atomically(path, content.getvalue())


# -- settings of clips -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoInput:
    """Settings of a video clip (docs/papers/avid_cma.md [2.2]); see :class:`VideoTransform`."""

    fps: PositiveFloat = 16.0
    duration: PositiveFloat = 0.5
    crop: PositiveInt = 224
    resize: PositiveInt = 256
    mode: Literal["msc", "crop"] = "msc"
    min_area: Fraction = 0.08
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.4, 0.4, 0.4, 0.2)
    keep_aspect: bool = True

    @property
    def frames(self) -> int:
        return frame_count(self.duration, self.fps)

    def transform(self, training: bool) -> VideoTransform:
        options = asdict(self)
        del options["fps"], options["duration"]
        return VideoTransform(**options, frames=self.frames, training=training)


@dataclass(frozen=True)
class AudioInput:
    """Settings of an audio clip (docs/papers/avid_cma.md [2.3]).

    `fft` is in samples: 1024 in the paper, which the official configs write as 512. `statistics` is an .npz file or the
    encoder's pre-training checkpoint with the statistics of the frequency bins. None computes statistics from training
    clips.
    """

    sample_rate: PositiveInt = 24000
    duration: PositiveFloat = 2.0
    fft: PositiveInt = 1024
    frames_per_second: PositiveInt = 100
    volume: Fraction = 0.1
    statistics: str | None = None

    def transform(self, training: bool, statistics: dict[str, np.ndarray] | None = None) -> AudioTransform:
        """Return the transform. It normalizes with `statistics` (mean and std [F]); without, it returns decibels."""
        options = asdict(self) | {name: values.tolist() for name, values in (statistics or {}).items()}
        del options["statistics"]
        return AudioTransform(window=options.pop("duration"), **options, training=training)


def read_statistics(path: Path) -> dict[str, np.ndarray]:
    """Read the statistics of frequency bins from an .npz file or one of our pre-training checkpoints."""
    if path.suffix == ".npz":
        with parsing(path, StageError), open_regular(path) as file, np.load(file) as content:
            statistics = {name: content[name] for name in ("mean", "std") if name in content}
    else:
        checkpoint = read_checkpoint(path)
        statistics = {name: value.numpy() for name, value in (checkpoint.get("audio_statistics") or {}).items()}
    if set(statistics) != {"mean", "std"}:
        raise StageError(
            f"data.audio.statistics: {path} holds no audio statistics (`mean` and `std`); give the checkpoint of the "
            "pre-training whose encoder is evaluated, or leave the field empty to compute them"
        )
    return statistics
