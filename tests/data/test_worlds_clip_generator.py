"""The generator of the audio-visual world: what picture and sound share, and what they do not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.worlds.clip_generator import (
    NUM_CLASSES,
    SHAPES,
    SOUND_CLASSES,
    TIMBRES,
    VIDEO_CLASSES,
    ClipGenerator,
    Nuisance,
)

SECONDS = 2.0
QUIET = Nuisance(background_strength=0.0, distractors=0, pixel_noise=0.0, opacity=1.0, snr=(60.0, 60.0), hums=0)


def _of_class(label: int, count: int) -> list[int]:
    return [label + NUM_CLASSES * n for n in range(count)]


@settings(max_examples=20, deadline=None)
@given(index=st.integers(0, 10_000), split=st.integers(1, 9), seed=st.integers(0, 100))
def test_a_clip_depends_on_seed_split_and_index_alone(index: int, split: int, seed: int) -> None:
    first, second = ClipGenerator(seed), ClipGenerator(seed)
    second.video(split, index + 1, SECONDS)  # what was rendered before does not matter
    assert np.array_equal(first.video(split, index, SECONDS), second.video(split, index, SECONDS))
    assert np.array_equal(first.audio(split, index, SECONDS), second.audio(split, index, SECONDS))
    assert not np.array_equal(first.video(split, index, SECONDS), ClipGenerator(seed + 1).video(split, index, SECONDS))
    assert not np.array_equal(first.video(split, index, SECONDS), first.video(split + 1, index, SECONDS))
    assert not np.array_equal(first.audio(split, index, SECONDS), first.audio(split, index + 12, SECONDS))


def test_shapes_types_and_ranges() -> None:
    generator = ClipGenerator(0, size=32, fps=10, sample_rate=16000)
    frames, samples = generator.video(1, 5, 1.5), generator.audio(1, 5, 1.5)
    assert (frames.shape, frames.dtype) == ((15, 32, 32, 3), np.uint8)
    assert (samples.shape, samples.dtype) == ((24000,), np.float32)
    assert 0.02 < np.abs(samples).max() <= 1.0


def test_classes_are_balanced_and_named() -> None:
    labels = [ClipGenerator.label(index) for index in range(10 * NUM_CLASSES)]
    assert np.bincount(labels).tolist() == [10] * NUM_CLASSES
    assert len(set(VIDEO_CLASSES)) == len(set(SOUND_CLASSES)) == NUM_CLASSES == 12


def test_a_pure_tone_peaks_at_its_base_frequency() -> None:
    steady_tone = 8  # third envelope, first timbre
    assert SOUND_CLASSES[steady_tone] == "steady pure tone"
    for index in _of_class(steady_tone, 8):
        samples = ClipGenerator(0, nuisance=QUIET).audio(1, index, SECONDS)
        spectrum = np.abs(np.fft.rfft(samples))
        peak = np.argmax(spectrum) / SECONDS
        assert 220 * np.exp(-0.5) - 1 <= peak <= 220 * np.exp(0.5) + 1
        assert (spectrum**2)[int(peak * SECONDS) - 3 : int(peak * SECONDS) + 4].sum() > 0.9 * (spectrum**2).sum()


@pytest.mark.parametrize("timbre", range(len(TIMBRES)))
def test_timbres_differ_in_their_spectrum(timbre: int) -> None:
    samples = ClipGenerator(1, nuisance=QUIET).audio(1, 8 + timbre, SECONDS)
    power = np.abs(np.fft.rfft(samples)) ** 2
    power = power / power.sum()
    peaks = int((power > 0.1).sum())
    if timbre == 3:
        assert np.sort(power)[::-1][:200].sum() < 0.9  # a band of noise spreads out
    else:
        assert peaks <= 8
        assert np.sort(power)[::-1][:24].sum() > 0.9


def object_mask(generator: ClipGenerator, split: int, index: int, duration: float) -> np.ndarray:
    """The pixels [T, size, size] that the object covers, found by rendering it without a background."""
    bare = Nuisance(generator.nuisance.background_cells, 0.0, 0, 0.0, 1.0)
    frames = ClipGenerator(generator.seed, generator.size, generator.fps, generator.sample_rate, bare).video(
        split, index, duration
    )
    return np.abs(frames.astype(int) - 128).max(axis=-1) > 40


def test_only_the_first_motion_moves_the_object() -> None:
    generator = ClipGenerator(0)
    travels: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for index in range(4 * NUM_CLASSES):
        motion = generator.label(index) // len(SHAPES)
        mask = object_mask(generator, 1, index, SECONDS)
        shown = mask.any(axis=(1, 2))
        centers = np.array([np.argwhere(frame).mean(axis=0) for frame in mask[shown]])
        travels[motion].append(float(np.ptp(centers, axis=0).max()))
    assert min(travels[0]) > 2.5
    assert max(travels[1]) == 0.0
    assert max(travels[2]) <= 1.0  # jitter of 0.15 pixels shifts a rasterized edge by one at most


def test_only_the_second_motion_blinks() -> None:
    generator = ClipGenerator(0)
    for index in range(4 * NUM_CLASSES):
        shown = object_mask(generator, 1, index, SECONDS).any(axis=(1, 2))
        if generator.label(index) // len(SHAPES) == 1:
            assert 0.2 < shown.mean() < 0.8
        else:
            assert shown.all()


def test_picture_and_sound_of_a_blinking_clip_share_the_tempo() -> None:
    """Counting the onsets in either modality gives the tempo of the clip."""
    generator = ClipGenerator(0, fps=48, nuisance=QUIET)
    seconds, errors = 4.0, []
    for index in [4 + NUM_CLASSES * n for n in range(6)]:
        tempo = generator.tempo(1, index)
        shown = object_mask(generator, 1, index, seconds).any(axis=(1, 2))
        samples = np.abs(generator.audio(1, index, seconds)).reshape(-1, 160).max(axis=1)
        loud = samples > 0.5 * np.median(samples[samples > np.median(samples)])
        for on in (shown, loud):
            onsets = int((np.diff(on.astype(int)) == 1).sum())
            errors.append(abs(onsets - tempo * seconds))
    assert max(errors) <= 1.0


def test_sound_of_the_second_envelope_is_gated() -> None:
    generator = ClipGenerator(0, nuisance=QUIET)
    for index in range(2 * NUM_CLASSES):
        energy = np.square(generator.audio(1, index, SECONDS)).reshape(-1, 400).mean(axis=1)
        quiet = float((energy < 0.05 * energy.max()).mean())
        if generator.label(index) // len(TIMBRES) == 1:
            assert 0.25 < quiet < 0.75
        else:
            assert quiet < 0.1


def test_background_and_sound_are_drawn_apart() -> None:
    """Brightness of the corners against loudness and pitch of the noise: no correlation over many clips of a class."""
    generator = ClipGenerator(3)
    pictures, sounds = [], []
    for index in _of_class(9, 150):
        frames = generator.video(1, index, 0.25).astype(float)
        pictures.append([frames[..., channel].mean() for channel in range(3)])
        samples = generator.audio(1, index, 0.5)
        power = np.abs(np.fft.rfft(samples)) ** 2
        sounds.append([np.log(power.sum()), np.log(power[:500].sum() / power[500:].sum())])
    table = np.corrcoef(np.array(pictures).T, np.array(sounds).T)[:3, 3:]
    assert np.abs(table).max() < 0.3  # 150 independent pairs stay below 0.27 in 999 of 1000 cases


def test_background_identifies_a_clip() -> None:
    """Two windows of one clip have the same background, other clips another one: the private cue of the modality."""
    generator = ClipGenerator(0)
    corners = []
    for index in range(40):
        frames = generator.video(1, index, SECONDS).astype(float)
        patches = np.stack([frames[:, :3, :3], frames[:, -3:, -3:], frames[:, :3, -3:], frames[:, -3:, :3]])
        corners.append(
            (np.median(patches[:, :8], axis=(1, 2, 3)).ravel(), np.median(patches[:, 8:], axis=(1, 2, 3)).ravel())
        )
    early, late = (np.array(side) for side in zip(*corners))
    distances = np.linalg.norm(early[:, None] - late[None], axis=-1)
    assert (distances.argmin(axis=1) == np.arange(40)).mean() > 0.9
