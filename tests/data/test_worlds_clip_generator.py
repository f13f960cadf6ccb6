"""The generator of the audio-visual world: what picture and sound share, and what they do not."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.worlds.clip_generator import (
    ENVELOPES,
    MIDDLE_PITCH,
    MOTIONS,
    NUM_CLASSES,
    PITCH_RANGE,
    PITCH_RANKS,
    SOUND_CLASSES,
    TIMBRES,
    VIDEO_CLASSES,
    ClipGenerator,
    Nuisance,
)

SECONDS = 2.0
QUIET = Nuisance(
    pitch_spread=0.0, background_strength=0.0, distractors=0, pixel_noise=0.0, opacity=1.0, snr=(60.0, 60.0), hums=0
)


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
    assert not np.array_equal(first.audio(split, index, SECONDS), first.audio(split, index + NUM_CLASSES, SECONDS))


def test_classes_that_are_neighbors_in_color_are_far_apart_in_pitch_and_differ_in_shape_and_motion() -> None:
    assert sorted(PITCH_RANKS) == list(range(NUM_CLASSES))
    for label in range(NUM_CLASSES):
        other = (label + 1) % NUM_CLASSES
        assert abs(PITCH_RANKS[label] - PITCH_RANKS[other]) > 5
        assert not set(VIDEO_CLASSES[label].split(" ", 1)) & set(VIDEO_CLASSES[other].split(" ", 1))


def test_a_pure_tone_peaks_at_the_pitch_of_its_class() -> None:
    steady_tone = SOUND_CLASSES.index("steady pure tone")
    place = 2 * PITCH_RANKS[steady_tone] / (NUM_CLASSES - 1) - 1
    for index in _of_class(steady_tone, 8):
        samples = ClipGenerator(0, nuisance=QUIET).audio(1, index, SECONDS)
        spectrum = np.abs(np.fft.rfft(samples))
        peak = np.argmax(spectrum) / SECONDS
        assert peak == pytest.approx(MIDDLE_PITCH * np.exp(PITCH_RANGE * place), abs=1)
        assert (spectrum**2)[int(peak * SECONDS) - 3 : int(peak * SECONDS) + 4].sum() > 0.9 * (spectrum**2).sum()


@pytest.mark.parametrize("timbre", TIMBRES)
def test_timbres_differ_in_their_spectrum(timbre: str) -> None:
    samples = ClipGenerator(1, nuisance=QUIET).audio(1, SOUND_CLASSES.index(f"steady {timbre}"), SECONDS)
    power = np.abs(np.fft.rfft(samples)) ** 2
    power = power / power.sum()
    if timbre == "rushing noise":
        assert np.sort(power)[::-1][:200].sum() < 0.9  # a band of noise spreads out
    else:
        assert int((power > 0.1).sum()) <= 8
        assert np.sort(power)[::-1][:24].sum() > 0.9


def object_mask(generator: ClipGenerator, split: int, index: int, duration: float) -> np.ndarray:
    """The pixels [T, size, size] that the object covers, found by rendering it without a background."""
    bare = replace(QUIET, color_spread=generator.nuisance.color_spread)
    frames = replace(generator, nuisance=bare).video(split, index, duration)
    return np.abs(frames.astype(int) - 128).max(axis=-1) > 40


def test_motions_move_blink_rest_and_grow() -> None:
    generator = ClipGenerator(0)
    for index in range(4 * NUM_CLASSES):
        mask = object_mask(generator, 1, index, SECONDS)
        shown = mask.any(axis=(1, 2))
        centers = np.array([np.argwhere(frame).mean(axis=0) for frame in mask[shown]])
        travel, sizes = float(np.ptp(centers, axis=0).max()), mask[shown].sum(axis=(1, 2))
        motion = MOTIONS[generator.label(index) % len(MOTIONS)]
        assert (0.2 < shown.mean() < 0.8) if motion == "blinking" else shown.all()
        assert travel > 2.5 if motion == "swinging" else travel < 2.5
        if motion == "growing":
            assert sizes.max() > 1.5 * sizes.min()
        elif motion != "swinging":  # which may leave the frame
            assert np.ptp(sizes) == 0


def test_picture_and_sound_of_a_blinking_clip_share_the_tempo() -> None:
    """Counting the onsets in either modality gives the tempo of the clip."""
    generator = ClipGenerator(0, fps=48, nuisance=QUIET)
    seconds, errors = 4.0, []
    for index in [1 + NUM_CLASSES * n for n in range(6)]:
        tempo = generator.shared(1, index).tempo
        shown = object_mask(generator, 1, index, seconds).any(axis=(1, 2))
        samples = np.abs(generator.audio(1, index, seconds)).reshape(-1, 160).max(axis=1)
        loud = samples > 0.5 * np.median(samples[samples > np.median(samples)])
        for on in (shown, loud):
            onsets = int((np.diff(on.astype(int)) == 1).sum())
            errors.append(abs(onsets - tempo * seconds))
    assert max(errors) <= 1.0


def test_picture_and_sound_of_a_clip_share_the_phase() -> None:
    """A blinking object is seen while its sound is heard."""
    generator = ClipGenerator(0, fps=40, nuisance=QUIET)
    for index in [1 + NUM_CLASSES * n for n in range(6)]:
        shown = object_mask(generator, 1, index, SECONDS).any(axis=(1, 2))
        energy = np.square(generator.audio(1, index, SECONDS)).reshape(-1, 200).mean(axis=1)
        assert (shown == (energy > 0.05 * energy.max())).mean() > 0.9


def test_large_objects_are_loud() -> None:
    generator = ClipGenerator(0, nuisance=QUIET)
    steady_disc = VIDEO_CLASSES.index("resting disc")
    sizes, levels = [], []
    for index in _of_class(steady_disc, 20):
        sizes.append(object_mask(generator, 1, index, 0.25)[0].sum())
        levels.append(np.square(generator.audio(1, index, SECONDS)).mean())
    assert np.corrcoef(np.sqrt(sizes), np.log(levels))[0, 1] > 0.95


def test_envelopes_gate_and_decay_the_sound() -> None:
    generator = ClipGenerator(0, nuisance=QUIET)
    for index in range(2 * NUM_CLASSES):
        energy = np.square(generator.audio(1, index, SECONDS)).reshape(-1, 400).mean(axis=1)
        quiet = float((energy < 0.05 * energy.max()).mean())
        envelope = ENVELOPES[generator.label(index) % len(ENVELOPES)]
        if envelope == "pulsing":
            assert 0.25 < quiet < 0.75
        elif envelope == "struck":
            assert float((energy < 0.25 * energy.max()).mean()) > 0.25
        else:
            assert quiet < 0.1


def test_background_and_sound_are_drawn_apart() -> None:
    """Brightness of the corners against loudness and pitch of the noise: no correlation over many clips of a class."""
    generator = ClipGenerator(3)
    pictures, sounds = [], []
    for index in _of_class(10, 150):
        frames = generator.video(1, index, 0.25).astype(float)
        pictures.append([frames[:, :3, :3, channel].mean() for channel in range(3)])
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
