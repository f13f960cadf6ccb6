"""Compare the reading of clips with torchcodec, including opening the file, in CPU time of one thread.

`make bench` lets torchcodec load PyAV's FFmpeg, so that both libraries decode with the same FFmpeg.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.media import MediaFile
from tests.benchmarks.speed import compare, in_turns
from tests.data.media_factory import tone, write_video


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ten seconds of noise over moving bars, at the frame size of a Kinetics copy."""
    generator = np.random.default_rng(0)
    bars = (127 + 100 * np.sin(np.arange(340 + 250) / 7))[None, :, None]
    frames = np.stack([bars[:, number : number + 340] * np.ones((256, 1, 3)) for number in range(250)])
    frames = frames + generator.normal(0, 8, (250, 256, 340, 1))
    path = tmp_path_factory.mktemp("benchmark") / "film.mp4"
    sound = tone(10.0, 44_100, channels=2)
    return write_video(
        path, frames=frames.clip(0, 255).astype(np.uint8), fps=25.0, audio=sound, audio_rate=44_100, key_frame_every=50
    )


def _torchcodec(film: Path) -> Any:
    """Return torchcodec's decoders, or skip the test if torchcodec or a shared FFmpeg is missing."""
    try:
        decoders = importlib.import_module("torchcodec.decoders")
        decoders.VideoDecoder(str(film))  # this call loads FFmpeg
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"torchcodec cannot be loaded: {str(error).splitlines()[0]}")
    return decoders


@pytest.mark.parametrize("duration", [0.5, 2.0])
def test_video(film: Path, duration: float) -> None:
    decoders, start = _torchcodec(film), 5.2
    numbers = [int(np.floor((start + k / 16) * 25)) for k in range(int(duration * 16))]

    def ours() -> np.ndarray:
        with MediaFile(film) as media:
            return media.read_video(start, duration, 16.0)[0].numpy()

    def theirs() -> np.ndarray:
        decoder = decoders.VideoDecoder(str(film), dimension_order="NHWC", seek_mode="approximate")
        return decoder.get_frames_at(numbers).data.numpy()

    assert np.abs(ours().astype(int) - theirs()).mean() < 1  # the same frames, but the color conversion differs
    seconds = in_turns({"ours": ours, "theirs": theirs}, 30)
    what = f"{duration:g} s of picture, 340 x 256, a key frame every 50"
    compare(what, "torchcodec", seconds["ours"], seconds["theirs"])


def test_audio(film: Path) -> None:
    decoders = _torchcodec(film)

    def ours() -> np.ndarray:
        with MediaFile(film) as media:
            return media.read_audio(5.2, 2.0, 24_000).numpy()

    def theirs() -> np.ndarray:
        decoder = decoders.AudioDecoder(str(film), sample_rate=24_000, num_channels=1)
        return decoder.get_samples_played_in_range(5.2, 7.2).data[0].numpy()

    # torchcodec's mono is sqrt(2) times our mean of two channels. A shift of half a sample would give an error of 0.05.
    np.testing.assert_allclose(ours() * 2**0.5, theirs(), rtol=0, atol=0.05)
    seconds = in_turns({"ours": ours, "theirs": theirs}, 30)
    compare("2 s of sound, AAC, 44,100 to 24,000 Hz", "torchcodec", seconds["ours"], seconds["theirs"])
