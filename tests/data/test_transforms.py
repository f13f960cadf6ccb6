"""Compare the video and audio transforms with reference arrays, and test properties of their random branches."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as v2
from hypothesis import given
from hypothesis import strategies as st

from common.data.transforms import (
    AudioInput,
    AudioTransform,
    VideoInput,
    VideoTransform,
    luma,
    random_area,
    read_statistics,
    shift_hue,
    write_audio_statistics,
)
from common.errors import StageError

GOLDEN = Path(__file__).parents[1] / "golden/avid_cma"
IDENTITY: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
NO_JITTER = (0.0, 0.0, 0.0, 0.0)


def _frames(count: int = 4, height: int = 30, width: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def test_defaults_are_avids() -> None:
    """Compare the defaults with docs/papers/avid_cma.md [2.2] and [2.3]."""
    video, sound = VideoInput().transform(training=True), AudioInput().transform(training=False)
    jitter = (0.4, 0.4, 0.4, 0.2)
    assert dataclasses.astuple(VideoInput()) == (16.0, 0.5, 224, 256, "msc", 0.08, jitter, True)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert dataclasses.astuple(video) == ("msc", 8, 224, 256, True, 0.08, jitter, 0.5, mean, std, True, True)
    assert video == VideoTransform(frames=8)
    assert dataclasses.astuple(sound) == (24_000, 2.0, 1024, 100, 0.1, (), (), False)
    assert AudioInput().transform(training=True) == AudioTransform()


# Tests of the video transform


@pytest.mark.parametrize(
    ("name", "options"), [("msc", {"resize": 36}), ("crop", {"mode": "crop", "resize": 40, "keep_aspect": False})]
)
def test_video_evaluation_equals_the_reference(name: str, options: dict) -> None:
    golden = np.load(GOLDEN / "video_eval_transform.npz")
    transform = VideoTransform(crop=32, frames=8, training=False, **options)
    result = transform(torch.from_numpy(golden["frames_uint8"]))
    np.testing.assert_allclose(result.numpy(), golden[f"{name}_out"], rtol=0, atol=1e-6)


@given(st.integers(1, 9), st.integers(0, 20))
def test_short_clips_begin_anew(length: int, wanted: int) -> None:
    frames = torch.arange(length, dtype=torch.uint8)[:, None, None, None].expand(length, 2, 2, 3)
    padded = VideoTransform(crop=2, resize=2, frames=wanted, training=False, **IDENTITY)(frames) * 255
    assert padded[0, :, 0, 0].round().tolist() == [k % length for k in range(max(length, wanted))]


@pytest.mark.parametrize("mode", ["msc", "crop"])
def test_training_depends_on_the_generator_alone(mode: str) -> None:
    transform = VideoTransform(mode=mode, crop=16, resize=18, frames=6)  # type: ignore[arg-type]
    frames = _frames()
    before = frames.clone()
    first, again, other = (transform(frames, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 6, 16, 16)
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(frames, before)


@pytest.mark.parametrize("crop", [12, 100])
def test_clips_together_equal_those_alone_bit_for_bit(crop: int) -> None:
    """Transform clips of several sizes and lengths, with the color operations in all orders."""
    clips = [_frames(length, crop + 3 + length, crop + 9) for length in (1, 3, 9) * 20]
    for training, jitter in ((True, (0.4, 0.4, 0.4, 0.2)), (True, NO_JITTER), (False, NO_JITTER)):
        transform = VideoTransform(crop=crop, resize=crop, frames=3, jitter=jitter, training=training)
        together = transform.together(clips, [transform.draw(np.random.default_rng(seed)) for seed in range(60)])
        for seed, (frames, clip) in enumerate(zip(clips, together, strict=True)):
            assert torch.equal(clip, transform(frames, np.random.default_rng(seed)))


def test_one_draw_for_all_frames_of_a_clip_also_in_other_blocks() -> None:
    still = _frames(1).expand(70, -1, -1, -1)
    clip = VideoTransform(crop=64)(still, np.random.default_rng(5))
    for number in range(1, 70):
        assert torch.equal(clip[:, number], clip[:, 0])


def test_what_is_ours_equals_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare crops, flips and brightness bit for bit, and hue up to rounding. Gray uses Pillow's published weights."""
    geometry = "torchvision.transforms.v2.functional._geometry"
    monkeypatch.setattr(f"{geometry}._do_native_uint8_resize_on_cpu", lambda _: True)  # by default, only with AVX2
    frames = _frames(4, 30, 26)
    area = VideoTransform(crop=16, min_area=0.3, jitter=NO_JITTER, flip=1.0, normalize=False)
    draws = np.random.default_rng(3).random(22)
    left, top, width, height = random_area(26, 30, 0.3, 4 / 3, [*draws[:20], draws[21], draws[20]])
    expected = v2.resized_crop(frames.permute(0, 3, 1, 2), top, left, height, width, [16, 16], antialias=True)
    assert torch.equal(area(frames, np.random.default_rng(3)), v2.horizontal_flip(expected).transpose(0, 1))

    crop = dataclasses.replace(area, mode="crop", resize=20, flip=0.0)
    top, left = int(draws[0] * (23 - 15)), int(draws[1] * (20 - 15))
    expected = v2.crop(v2.resize(frames.permute(0, 3, 1, 2), [20], antialias=True), top, left, 16, 16)
    assert torch.equal(crop(frames, np.random.default_rng(3)), expected.transpose(0, 1))

    plain = VideoTransform(crop=16, resize=18, training=False)
    expected = v2.center_crop(v2.resize(frames.permute(0, 3, 1, 2), [18], antialias=True), [16, 16])
    expected = v2.normalize(v2.to_dtype(expected, torch.float32, scale=True), list(plain.mean), list(plain.std))
    torch.testing.assert_close(plain(frames), expected.transpose(0, 1), rtol=0, atol=1e-6)

    colors = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    turned = colors.transpose(0, 1).contiguous()
    shift_hue(turned.numpy(), 0.13)
    torch.testing.assert_close(turned.transpose(0, 1), v2.adjust_hue(colors, 0.13), rtol=0, atol=2e-6)


@pytest.mark.parametrize("operation", [0, 1, 2])
def test_color_operations_equal_torchvision_but_for_the_weights_of_gray(operation: int) -> None:
    frames, options = _frames(3, 12, 12), {"crop": 12, "resize": 12, "flip": 0.0, "mode": "crop", **IDENTITY}
    plain = VideoTransform(jitter=NO_JITTER, **options)(frames, np.random.default_rng(0))  # type: ignore[arg-type]
    adjust = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation)[operation]
    for seed in range(20):
        strength, low = ((0.4, 0.6), (1.0, 0.0), (1.5, 0.0))[seed % 3]
        strengths = tuple(strength * (place == operation) for place in range(4))
        found = VideoTransform(jitter=strengths, **options)(frames, np.random.default_rng(seed))  # type: ignore[arg-type]
        factor = low + (1 + strength - low) * np.random.default_rng(seed).random(31)[-4 + operation]
        expected = adjust(plain.transpose(0, 1), factor).transpose(0, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_the_order_of_color_operations_varies() -> None:
    frames, options = _frames(1, 8, 8), {"crop": 8, "resize": 8, "mode": "crop", "flip": 0.0, **IDENTITY}
    plain = VideoTransform(jitter=NO_JITTER, **options)(frames, np.random.default_rng(0)).numpy()

    def saturated(colors: np.ndarray, draws: np.ndarray) -> np.ndarray:
        factor = np.float32(0.6 + 0.8 * draws[6])
        return np.clip(factor * colors + (1 - factor) * luma(colors), 0, 1)

    def turned(colors: np.ndarray, draws: np.ndarray) -> np.ndarray:
        colors = colors.copy()
        shift_hue(colors, float(0.4 * draws[7] - 0.2))
        return colors

    for seed in range(20):
        draws = np.random.default_rng(seed).random(31)[-8:]
        found = VideoTransform(jitter=(0.0, 0.0, 0.4, 0.2), **options)(frames, np.random.default_rng(seed)).numpy()
        first, second = (saturated, turned) if draws[2] < draws[3] else (turned, saturated)
        np.testing.assert_allclose(found, second(first(plain, draws), draws), rtol=0, atol=1e-5)


# Tests of the audio transform


def _waveform() -> torch.Tensor:
    return torch.from_numpy(np.load(GOLDEN / "logspec.npz")["waveform_int16"].astype(np.float32)) / 32767


def test_decibels_equal_the_reference() -> None:
    golden = np.load(GOLDEN / "logspec.npz")
    decibels = AudioTransform(training=False).decibels(_waveform())
    assert decibels.shape == (1, 200, 257)
    np.testing.assert_allclose(decibels[0, 100].numpy(), golden["db_paper_reflect_frame100"], rtol=0, atol=3e-5)
    assert float(decibels.max()) == pytest.approx(float(golden["db_paper_reflect_max"]), abs=1e-4)
    assert float(decibels.min()) == pytest.approx(float(golden["db_paper_reflect_min"]), abs=1e-4)


def test_normalized_spectrogram_equals_the_reference() -> None:
    golden = np.load(GOLDEN / "logspec.npz")
    silence = np.load(GOLDEN / "audio_prep.npz")["silence_logspec_row0"].astype(np.float64)
    # The project lacks the reference's statistics, but two known values per bin (silence: -100 dB) determine them.
    decibels = golden["db_paper_reflect_frame100"].astype(np.float64)
    scale = (golden["logspec_paper_reflect"][0, 100] - silence) / (decibels + 100.0)
    mean, std = -100.0 - silence / scale, 1.0 / scale - 1e-5
    transform = AudioTransform(mean=mean.tolist(), std=std.tolist(), training=False)
    np.testing.assert_allclose(transform(_waveform()).numpy(), golden["logspec_paper_reflect"], rtol=0, atol=6e-6)
    quiet = transform(torch.zeros(48_000))
    np.testing.assert_allclose(quiet[0].numpy(), np.tile(silence, (200, 1)), rtol=0, atol=6e-6)


def test_small_spectrogram_equals_the_reference_up_to_its_statistics() -> None:
    golden = np.load(GOLDEN / "logspec.npz")["logspec_small_reflect"][0].astype(np.float64)
    decibels = AudioTransform(fft=512, frames_per_second=50, training=False).decibels(_waveform())[0].double().numpy()
    assert decibels.shape == golden.shape == (100, 129)
    for band in range(129):
        fit = np.polyfit(decibels[:, band], golden[:, band], 1)
        np.testing.assert_allclose(np.polyval(fit, decibels[:, band]), golden[:, band], rtol=0, atol=6e-6)


def test_samples_are_mixed_cut_and_padded_as_in_the_reference() -> None:
    golden = np.load(GOLDEN / "audio_prep.npz")
    for name, seconds in (("stereo_out_pad_1200", 0.05), ("stereo_out_trim_480", 0.02)):
        transform = AudioTransform(window=seconds, fft=256, training=False)
        np.testing.assert_allclose(transform.prepare(torch.from_numpy(golden["stereo_in"])), golden[name][0], atol=1e-7)


def test_sounds_together_equal_those_alone_bit_for_bit() -> None:
    sounds = [_waveform()[: 12_500 - 90 * number] * (number % 4) for number in range(12)]
    transform = AudioTransform(sample_rate=8_000, window=1.5, fft=512, frames_per_second=32)
    together = transform.together(sounds, [transform.draw(np.random.default_rng(seed)) for seed in range(12)])
    for seed, (samples, found) in enumerate(zip(sounds, together, strict=True)):
        assert torch.equal(found, transform(samples, np.random.default_rng(seed)))


def test_volume_is_the_only_augmentation_of_sound() -> None:
    samples = torch.randn(12_000, generator=torch.Generator().manual_seed(0))
    transform = AudioTransform(sample_rate=8_000, window=1.5, fft=512, frames_per_second=32)
    plain = transform.with_training(False)(samples)
    for seed in range(20):
        difference = transform(samples, np.random.default_rng(seed)) - plain
        assert float(difference.std()) < 1e-3
        gain = 0.9 + 0.2 * np.random.default_rng(seed).random()
        assert 10 ** (float(difference.mean()) / 20) == pytest.approx(gain, rel=1e-4)
    assert torch.equal(dataclasses.replace(transform, volume=0.0)(samples), plain)  # needs no generator


def test_statistics_are_computed_written_and_used(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    varied = torch.arange(129) != 3
    clips = [torch.randn(1, 48, 129, generator=generator) * 5 * varied - 20 + torch.arange(129) for _ in range(7)]
    path = tmp_path / "deep" / "statistics.npz"
    write_audio_statistics(iter(clips), path)
    mean, std = read_statistics(path).values()
    values = torch.stack(clips).double().reshape(-1, 129)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, values.std(0, unbiased=False), rtol=1e-5, atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == ["statistics.npz"]
    small = AudioTransform(sample_rate=8_000, window=1.5, fft=512, frames_per_second=32, training=False)
    transform = dataclasses.replace(small, mean=mean.tolist(), std=std.tolist())
    samples = torch.randn(12_000, generator=generator)
    expected = (small(samples) - torch.from_numpy(mean)) / torch.from_numpy(std + 1e-5)
    torch.testing.assert_close(transform(samples), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(samples), transform(samples))
    np.savez(path, mean=mean)
    for wrong in (path, tmp_path / "none.npz"):
        with pytest.raises(StageError, match=str(wrong)):
            read_statistics(wrong)
    with pytest.raises(ValueError, match="no spectrogram"):
        write_audio_statistics([], path)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (AudioTransform, {"frames_per_second": 7}, "frames_per_second"),
        (AudioTransform, {"fft": 1022}, "fft"),
        (AudioTransform, {"window": 0.02, "fft": 960}, "0.02 s"),
        (AudioTransform, {"mean": [1.0, 2.0]}, "statistics"),
        (VideoTransform, {"crop": 32, "resize": 16}, "resize"),
    ],
)
def test_settings_are_checked(kind: Any, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kind(**options)


@pytest.mark.parametrize(("training", "jitter"), [(False, 0.4), (True, 0.0)])
def test_bytes_are_normalized_later_bit_for_bit(training: bool, jitter: float) -> None:
    whole = VideoTransform(crop=12, resize=14, frames=7, jitter=(jitter,) * 4, training=training)
    bare = dataclasses.replace(whole, normalize=False)
    frames = torch.randint(0, 256, (5, 20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = whole(frames, np.random.default_rng(1))
    video = bare(frames, np.random.default_rng(1))
    assert video.dtype == torch.uint8
    assert video.is_contiguous()
    assert expected.is_contiguous()
    assert torch.equal(bare.normalized(torch.stack([video, video])), torch.stack([expected, expected]))
