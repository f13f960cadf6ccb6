"""Procedural clips with sound: what moves and how it sounds is the class, everything else is private to one modality.

Picture and sound of a clip share exactly two things: the class and the tempo. Background, colours, hums and noise are
drawn separately for each modality and stay the same throughout a clip, so they identify a clip inside its own modality
and tell nothing about the other one. Cross-modal discrimination therefore has to find the class.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SHAPES = ("disc", "frame", "horizontal stripes", "vertical stripes")
MOTIONS = ("swinging", "blinking", "resting")
TIMBRES = ("pure tone", "odd partials", "bell", "rushing noise")
ENVELOPES = ("wobbling", "pulsing", "steady")

VIDEO_CLASSES = tuple(f"{motion} {shape}" for motion in MOTIONS for shape in SHAPES)
SOUND_CLASSES = tuple(f"{envelope} {timbre}" for envelope in ENVELOPES for timbre in TIMBRES)
NUM_CLASSES = len(VIDEO_CLASSES)

BASE_FREQUENCIES = (220.0, 330.0, 520.0, 800.0)
_PARTIALS = {0: (1.0,), 1: (1.0, 3.0, 5.0), 2: (1.0, 1.41, 1.99)}
_REFERENCE_SIZE = 24.0  # lengths below are in pixels of a 24 x 24 frame
_PICTURE, _SOUND, _SHARED = 0, 1, 2  # independent random streams of one clip


@dataclass(frozen=True)
class Nuisance:
    """How strong the private factors of a draw are.

    Args:
        background_cells: smallest and largest number of background cells along a side.
        background_strength: standard deviation of the background around mid-grey.
        distractors: number of small static discs behind the object.
        pixel_noise: standard deviation of the pixel noise.
        opacity: opacity of the object.
        snr: lowest and highest ratio of signal to noise in decibels.
        hums: number of constant hums.
        pitch_spread: half width of the base frequency's log-uniform range.
    """

    background_cells: tuple[int, int] = (2, 3)
    background_strength: float = 0.12
    distractors: int = 1
    pixel_noise: float = 0.02
    opacity: float = 0.95
    snr: tuple[float, float] = (6.0, 15.0)
    hums: int = 2
    pitch_spread: float = 0.5


@dataclass(frozen=True)
class ClipGenerator:
    """Renders clip number `index` of a split; the same arguments always give the same bytes.

    Args:
        seed: seed of the world.
        size: side of a frame in pixels.
        fps: frames per second.
        sample_rate: samples per second of the sound.
        nuisance: strength of the private factors.
    """

    seed: int
    size: int = 24
    fps: int = 8
    sample_rate: int = 8000
    nuisance: Nuisance = field(default_factory=Nuisance)

    @staticmethod
    def label(index: int) -> int:
        """Class of a clip: classes take turns, so every run of 12 clips is balanced."""
        return index % NUM_CLASSES

    def _rng(self, split: int, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, split, index, stream])

    def tempo(self, split: int, index: int) -> float:
        """Return the tempo in hertz, log-uniform in [1, 3], that picture and sound share."""
        return float(np.exp(self._rng(split, index, _SHARED).uniform(0.0, np.log(3.0))))

    def video(self, split: int, index: int, duration: float) -> np.ndarray:
        """Render the picture.

        Returns:
            uint8 [T, size, size, 3] with T = round(duration * fps).
        """
        label, rng, nuisance = self.label(index), self._rng(split, index, _PICTURE), self.nuisance
        shape, motion = label % len(SHAPES), label // len(SHAPES)
        unit = self.size / _REFERENCE_SIZE
        times = np.arange(round(duration * self.fps)) / self.fps
        phase = 2 * np.pi * self.tempo(split, index) * times + rng.uniform(0, 2 * np.pi)

        still = self._background(rng, unit)
        # A colour close to the background would hide the object.
        mean_colour = still.mean(axis=(0, 1))
        colour = rng.uniform(size=3)
        while np.abs(colour - mean_colour).max() <= 0.35:
            colour = rng.uniform(size=3)

        radius = rng.uniform(6, 8) * unit
        center = rng.uniform(8, 16, size=2) * unit
        direction, amplitude = rng.uniform(0, 2 * np.pi), rng.uniform(3.5, 5.5) * unit
        x, y = np.full_like(times, center[0]), np.full_like(times, center[1])
        visible = np.ones_like(times)
        if motion == 0:
            x = x + amplitude * np.cos(direction) * np.sin(phase)
            y = y + amplitude * np.sin(direction) * np.sin(phase)
        elif motion == 1:
            visible = (np.sin(phase) > 0).astype(float)
        else:
            x = x + rng.uniform(-0.15, 0.15, size=times.shape) * unit
        mask = _shape_mask(shape, x, y, radius, self.size, unit) * visible[:, None, None]

        blend = nuisance.opacity * mask[..., None]
        frames = still * (1 - blend) + colour * blend
        frames += rng.normal(0, nuisance.pixel_noise, size=frames.shape)
        return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)

    def _background(self, rng: np.random.Generator, unit: float) -> np.ndarray:
        nuisance = self.nuisance
        low, high = nuisance.background_cells
        cells = int(rng.integers(low, high + 1))
        weights = _bilinear_weights(cells, self.size)
        field_ = np.einsum("yi,xj,ijc->yxc", weights, weights, rng.normal(size=(cells, cells, 3)))
        still = 0.5 + nuisance.background_strength * field_
        grid = np.arange(self.size)
        for _ in range(nuisance.distractors):
            spot, radius, colour = rng.uniform(0, self.size, 2), rng.uniform(1.5, 3.5) * unit, rng.uniform(size=3)
            inside = (grid[None, :] - spot[0]) ** 2 + (grid[:, None] - spot[1]) ** 2 <= radius**2
            still[inside] = colour
        return still

    def audio(self, split: int, index: int, duration: float) -> np.ndarray:
        """Render the sound.

        Returns:
            float32 [round(duration * sample_rate)] in [-1, 1].
        """
        label, rng, nuisance = self.label(index), self._rng(split, index, _SOUND), self.nuisance
        timbre, envelope = label % len(TIMBRES), label // len(TIMBRES)
        samples = round(duration * self.sample_rate)
        times = np.arange(samples) / self.sample_rate
        phase = 2 * np.pi * self.tempo(split, index) * times + rng.uniform(0, 2 * np.pi)

        base = BASE_FREQUENCIES[timbre] * np.exp(rng.uniform(-nuisance.pitch_spread, nuisance.pitch_spread))
        bend = 2 ** (0.4 * np.sin(phase)) if envelope == 0 else np.ones_like(times)
        angle = 2 * np.pi * base * np.cumsum(bend) / self.sample_rate
        frequencies = np.fft.rfftfreq(samples, 1 / self.sample_rate)
        if timbre == 3:
            signal = _shaped_noise(rng, samples, np.exp(-(((frequencies - 1600.0) / 500.0) ** 2)))
            if envelope == 0:
                signal = signal * (0.6 + 0.4 * np.sin(phase))
            signal = signal + 0.35 * np.sin(angle)
        else:
            # A partial above half the sample rate would fold back; 5 * 330 * exp(0.5) * 2^0.4 stays below 4 kHz.
            signal = np.sum([np.sin(angle * partial) for partial in _PARTIALS[timbre]], axis=0)
        if envelope == 1:
            signal = signal * (np.sin(phase) > 0)
        signal = signal / max(_rms(signal), 1e-6)

        position = frequencies / (self.sample_rate / 2)
        knots = rng.normal(size=9)
        log_gain = np.interp(position, np.linspace(0, 1, 9), knots) - 1.5 * position
        noise = _shaped_noise(rng, samples, np.exp(log_gain))
        for _ in range(nuisance.hums):
            frequency = np.exp(rng.uniform(np.log(120.0), np.log(min(3500.0, 0.45 * self.sample_rate))))
            noise = noise + 0.7 * np.sin(2 * np.pi * frequency * times + rng.uniform(0, 2 * np.pi))
        noise = noise / _rms(noise) * 10 ** (-rng.uniform(*nuisance.snr) / 20)
        gain = 0.3 * 10 ** (rng.uniform(-10, 0) / 20)
        return np.clip(gain * (signal + noise), -1, 1).astype(np.float32)


def _rms(signal: np.ndarray) -> float:
    return float(np.sqrt(np.mean(signal**2)))


def _shaped_noise(rng: np.random.Generator, samples: int, gain: np.ndarray) -> np.ndarray:
    """White noise with the given amplitude per frequency, scaled to unit standard deviation."""
    noise = np.fft.irfft(np.fft.rfft(rng.normal(size=samples)) * gain, n=samples)
    return noise / max(_rms(noise), 1e-9)


def _bilinear_weights(cells: int, size: int) -> np.ndarray:
    """Weights [size, cells] that interpolate values at cell centers, constant beyond the outer centers."""
    position = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells)[None, :]))


def _shape_mask(shape: int, x: np.ndarray, y: np.ndarray, radius: float, size: int, unit: float) -> np.ndarray:
    """Coverage [T, size, size] of a shape centered at (x, y) pixels, one center per frame."""
    grid = np.arange(size)
    dx = np.broadcast_to(grid[None, None, :] - x[:, None, None], (len(x), size, size))
    dy = np.broadcast_to(grid[None, :, None] - y[:, None, None], (len(x), size, size))
    if shape == 0:
        return (dx**2 + dy**2 <= radius**2).astype(float)
    chessboard = np.maximum(np.abs(dx), np.abs(dy))
    inside = chessboard <= radius
    if shape == 1:
        return (inside & (chessboard > radius - 2 * unit)).astype(float)
    along = dy if shape == 2 else dx
    stripe = np.floor((along + radius) / (2 * unit)).astype(int) % 2 == 0
    return (inside & stripe).astype(float)
