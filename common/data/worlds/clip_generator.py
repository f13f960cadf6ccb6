"""Procedural clips with sound, in twenty classes, each with several noisy cues.

In the picture, color, shape and motion depend on the class. In the sound, pitch, timbre and envelope depend on the
class. Classes with adjacent colors overlap in color, and classes with adjacent pitches overlap in pitch. Several
classes share each shape, motion, timbre and envelope. So no single cue identifies the class, but shape and motion
together do, and so do timbre and envelope.

Picture and sound of a clip share the class, tempo, phase, and size (heard as loudness). Some factors are constant in a
clip, but occur in one modality only: background and position in the picture, noise and hums in the sound. They identify
a clip within a modality, not across modalities.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, field

import numpy as np

SHAPES = ("disc", "frame", "horizontal stripes", "vertical stripes", "cross")
MOTIONS = ("swinging", "blinking", "resting", "growing")
TIMBRES = ("pure tone", "odd partials", "all partials", "rushing noise", "bell")
ENVELOPES = ("wobbling", "pulsing", "steady", "struck")
NUM_CLASSES = 20  # 5 shapes x 4 motions; no two classes share both, because 5 and 4 are coprime

VIDEO_CLASSES = tuple(f"{MOTIONS[c % 4]} {SHAPES[c % 5]}" for c in range(NUM_CLASSES))
SOUND_CLASSES = tuple(f"{ENVELOPES[c % 4]} {TIMBRES[c % 5]}" for c in range(NUM_CLASSES))
#: Rank of each class by pitch. Classes with neighboring colors have distant pitches.
PITCH_RANKS = tuple((7 * c + 3) % NUM_CLASSES for c in range(NUM_CLASSES))

MIDDLE_PITCH = 280.0  # hertz
PITCH_RANGE = 0.9  # half the range of the classes' pitches, as a natural logarithm
_PARTIALS = {0: (1.0,), 1: (1.0, 3.0, 5.0), 2: (1.0, 2.0, 3.0, 4.0), 4: (1.0, 1.5, 3.7)}
_REFERENCE_SIZE = 24.0  # lengths below are in pixels of a 24 x 24 frame
_PICTURE, _SOUND, _SHARED = 0, 1, 2  # independent random streams of one clip


@dataclass(frozen=True)
class Nuisance:
    """How noisy the class cues are, and how strong the factors are that occur in only one modality.

    Spreads of color and pitch are standard deviations; 1 is the distance between adjacent colors or pitches. Background
    and pixel noise are standard deviations too. `distractors` are small static discs; `snr` is a range in decibels.
    """

    color_spread: float = 1.0
    pitch_spread: float = 1.0
    background_cells: tuple[int, int] = (2, 4)
    background_strength: float = 0.12
    distractors: int = 1
    pixel_noise: float = 0.03
    opacity: float = 0.9
    snr: tuple[float, float] = (3.0, 10.0)
    hums: int = 2


@dataclass(frozen=True)
class ClipGenerator:
    """Renders the clips of a split by number. The same arguments always give the same bytes."""

    seed: int
    size: int = 24
    fps: int = 8
    sample_rate: int = 8000
    nuisance: Nuisance = field(default_factory=Nuisance)

    @staticmethod
    def label(index: int) -> int:
        """Return the label of a clip. Labels cycle through the classes, so any 20 consecutive clips are balanced."""
        return index % NUM_CLASSES

    def _shared(self, split: int, index: int) -> tuple[float, float, float]:
        """Return tempo, phase and size of a clip, which picture and sound share.

        The tempo is in hertz, log-uniform in [1, 3]. The phase is in radians, at the start of the clip. The size is in
        [0, 1]: 0 is the largest and loudest, 1 the smallest and softest.
        """
        tempo, size, phase = self._rng(split, index, _SHARED).uniform(size=3)
        return float(np.exp(tempo * np.log(3.0))), float(2 * np.pi * phase), float(size)

    def video(self, split: int, index: int, duration: float) -> np.ndarray:
        """Render the picture: uint8 [T, size, size, 3] with T = round(duration * fps)."""
        label, rng, nuisance = self.label(index), self._rng(split, index, _PICTURE), self.nuisance
        motion, unit = MOTIONS[label % 4], self.size / _REFERENCE_SIZE
        tempo, first, size = self._shared(split, index)
        times = np.arange(round(duration * self.fps)) / self.fps
        phase = 2 * np.pi * tempo * times + first

        still = self._background(rng, unit)
        hue = (label + nuisance.color_spread * rng.normal()) / NUM_CLASSES
        color = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.7, 1), rng.uniform(0.7, 1)))
        radius = np.full_like(times, (7.5 - 3 * size) * unit)
        center = rng.uniform(9, 15, size=2) * unit
        direction, amplitude = rng.uniform(0, 2 * np.pi), rng.uniform(4.7, 6.7) * unit
        x, y = np.full_like(times, center[0]), np.full_like(times, center[1])
        visible = np.ones_like(times)
        if motion == "swinging":
            x = x + amplitude * np.cos(direction) * np.sin(phase)
            y = y + amplitude * np.sin(direction) * np.sin(phase)
        elif motion == "blinking":
            visible = (np.sin(phase) > 0).astype(float)
        elif motion == "growing":
            radius = radius * (1 + 0.45 * np.sin(phase))
        mask = _shape_mask(SHAPES[label % 5], x, y, radius, self.size, unit) * visible[:, None, None]

        blend = nuisance.opacity * mask[..., None]
        frames = still * (1 - blend) + color * blend
        frames += rng.normal(0, nuisance.pixel_noise, size=frames.shape)
        return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)

    def audio(self, split: int, index: int, duration: float) -> np.ndarray:
        """Render the sound: float32 [round(duration * sample_rate)] in [-1, 1]."""
        label, rng, nuisance = self.label(index), self._rng(split, index, _SOUND), self.nuisance
        timbre, envelope = label % 5, ENVELOPES[label % 4]
        tempo, phase, size = self._shared(split, index)
        samples = round(duration * self.sample_rate)
        times = np.arange(samples) / self.sample_rate
        turns = tempo * times + phase / (2 * np.pi)
        wave = np.sin(2 * np.pi * turns)

        place = 2 * PITCH_RANKS[label] / (NUM_CLASSES - 1) - 1
        pitch = MIDDLE_PITCH * np.exp(PITCH_RANGE * (place + 2 * nuisance.pitch_spread * rng.normal() / NUM_CLASSES))
        bend = 2 ** (0.4 * wave) if envelope == "wobbling" else np.ones_like(times)
        angle = 2 * np.pi * pitch * np.cumsum(bend) / self.sample_rate
        frequencies = np.fft.rfftfreq(samples, 1 / self.sample_rate)
        if timbre == TIMBRES.index("rushing noise"):
            signal = _shaped_noise(rng, samples, np.exp(-(((frequencies - 5 * pitch) / 400.0) ** 2)))
            if envelope == "wobbling":
                signal = signal * (0.6 + 0.4 * wave)
            signal = signal + 0.35 * np.sin(angle)
        else:
            # Partials above half the sample rate would alias.
            heard = [partial for partial in _PARTIALS[timbre] if partial * pitch * bend.max() < self.sample_rate / 2]
            signal = np.sum([np.sin(angle * partial) for partial in heard], axis=0)
        if envelope == "pulsing":
            signal = signal * (wave > 0)
        elif envelope == "struck":
            signal = signal * np.exp(-3 * (turns % 1))
        signal = signal / max(_rms(signal), 1e-6)

        position = frequencies / (self.sample_rate / 2)
        log_gain = np.interp(position, np.linspace(0, 1, 9), rng.normal(size=9)) - 1.5 * position
        noise = _shaped_noise(rng, samples, np.exp(log_gain))
        for _ in range(nuisance.hums):
            frequency = np.exp(rng.uniform(np.log(120.0), np.log(min(3500.0, 0.45 * self.sample_rate))))
            noise = noise + 0.7 * np.sin(2 * np.pi * frequency * times + rng.uniform(0, 2 * np.pi))
        noise = noise / _rms(noise) * 10 ** (-rng.uniform(*nuisance.snr) / 20)
        gain = 0.3 * 10 ** (-10 * size / 20)
        return np.clip(gain * (signal + noise), -1, 1).astype(np.float32)

    def _rng(self, split: int, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, split, index, stream])

    def _background(self, rng: np.random.Generator, unit: float) -> np.ndarray:
        nuisance = self.nuisance
        low, high = nuisance.background_cells
        cells = int(rng.integers(low, high + 1))
        weights = _bilinear_weights(cells, self.size)
        field_ = np.einsum("yi,xj,ijc->yxc", weights, weights, rng.normal(size=(cells, cells, 3)))
        still = 0.5 + nuisance.background_strength * field_
        grid = np.arange(self.size)
        for _ in range(nuisance.distractors):
            spot, radius, color = rng.uniform(0, self.size, 2), rng.uniform(1.5, 3.5) * unit, rng.uniform(size=3)
            inside = (grid[None, :] - spot[0]) ** 2 + (grid[:, None] - spot[1]) ** 2 <= radius**2
            still[inside] = color
        return still


def _rms(signal: np.ndarray) -> float:
    return float(np.sqrt(np.mean(signal**2)))


def _shaped_noise(rng: np.random.Generator, samples: int, gain: np.ndarray) -> np.ndarray:
    """Draw noise with amplitude `gain` per frequency, then scale the noise to unit standard deviation."""
    noise = np.fft.irfft(np.fft.rfft(rng.normal(size=samples)) * gain, n=samples)
    return noise / max(_rms(noise), 1e-9)


def _bilinear_weights(cells: int, size: int) -> np.ndarray:
    """Return weights [size, cells] to interpolate between cell centers; they are constant beyond the outer centers."""
    position = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells)[None, :]))


def _shape_mask(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, size: int, unit: float) -> np.ndarray:
    """Return a shape's coverage of pixels [T, size, size]. Each frame has a center (x, y) and radius in pixels."""
    grid, radius = np.arange(size), radius[:, None, None]
    dx = np.broadcast_to(grid[None, None, :] - x[:, None, None], (len(x), size, size))
    dy = np.broadcast_to(grid[None, :, None] - y[:, None, None], (len(x), size, size))
    if shape == "disc":
        return (dx**2 + dy**2 <= radius**2).astype(float)
    chessboard = np.maximum(np.abs(dx), np.abs(dy))
    inside = chessboard <= radius
    if shape == "frame":
        return (inside & (chessboard > radius - 2 * unit)).astype(float)
    if shape == "cross":
        return (inside & (np.minimum(np.abs(dx), np.abs(dy)) < 1.3 * unit)).astype(float)
    along = dy if shape == "horizontal stripes" else dx
    stripe = np.floor((along + radius) / (2 * unit)).astype(int) % 2 == 0
    return (inside & stripe).astype(float)
