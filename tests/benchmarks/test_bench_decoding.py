"""Our reading of clips beside a bare PyAV loop over the same frames and torchcodec, in one run.

Opening included, one thread, process CPU time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from common.data.media import MediaFile
from tests.benchmarks.speed import compare, in_turns
from tests.data.media_factory import tone, write_video


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds of noise over moving bars, in the size of a Kinetics copy."""
    generator = np.random.default_rng(0)
    bars = (127 + 100 * np.sin(np.arange(340 + 250) / 7))[None, :, None]
    frames = np.stack([bars[:, number : number + 340] * np.ones((256, 1, 3)) for number in range(250)])
    frames = frames + generator.normal(0, 8, (250, 256, 340, 1))
    path = tmp_path_factory.mktemp("benchmark") / "film.mp4"
    sound = tone(10.0, 44_100, channels=2)
    return write_video(
        path, frames=frames.clip(0, 255).astype(np.uint8), fps=25.0, audio=sound, audio_rate=44_100, key_frame_every=50
    )


def _bare_video(path: Path, start: float, numbers: list[int]) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.time_base is not None
        container.seek(int(start / stream.time_base), stream=stream, backward=True)
        chosen: list[np.ndarray] = []
        for frame in container.decode(stream):
            assert frame.time is not None
            if round(frame.time * 25) in numbers:
                chosen.append(frame.to_ndarray(format="rgb24"))
            if len(chosen) == len(numbers):
                break
    return np.stack(chosen)


def _bare_audio(path: Path, start: float, duration: float) -> np.ndarray:
    resampler = av.AudioResampler(format="s16", layout="mono", rate=24_000)
    parts: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert stream.time_base is not None
        container.seek(int((start - 0.5) / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            assert frame.time is not None
            if frame.time + 0.1 > start:
                parts += [out.to_ndarray() for out in resampler.resample(frame)]
            if frame.time > start + duration:
                break
    return np.concatenate(parts, axis=1)[0, : int(duration * 24_000)].astype(np.float32) / 32767


def _torchcodec(film: Path) -> Any:
    """Its decoders, or None where it or a shared FFmpeg is missing."""
    try:
        decoders = importlib.import_module("torchcodec.decoders")
        decoders.VideoDecoder(str(film))  # FFmpeg is only loaded now
    except (ImportError, OSError, RuntimeError) as error:
        print(f"\ntorchcodec is skipped: {str(error).splitlines()[0]}")
        return None
    return decoders


@pytest.mark.parametrize("duration", [0.5, 2.0])
def test_video(film: Path, duration: float) -> None:
    start = 5.2
    numbers = [int(np.floor((start + k / 16) * 25)) for k in range(int(duration * 16))]

    def ours() -> np.ndarray:
        with MediaFile(film) as media:
            return media.read_video(start, duration, 16.0)[0].numpy()

    assert np.array_equal(ours(), _bare_video(film, start, numbers))
    steps: dict[str, Callable[[], Any]] = {"ours": ours, "bare": lambda: _bare_video(film, start, numbers)}
    if torchcodec := _torchcodec(film):

        def other() -> Any:
            decoder = torchcodec.VideoDecoder(str(film), dimension_order="NHWC", seek_mode="approximate")
            return decoder.get_frames_at(numbers).data.numpy()

        assert np.abs(ours().astype(int) - other()).mean() < 1  # the same frames, by another conversion of colors
        steps["torchcodec"] = other
    seconds = in_turns(steps, 30)
    what = f"{duration:g} s of picture, 340 x 256, a key frame every 50"
    compare(what, "bare PyAV", seconds["ours"], seconds["bare"]).stays_below(1.2)
    if torchcodec:
        compare(what, "torchcodec", seconds["ours"], seconds["torchcodec"])


def test_audio(film: Path) -> None:
    def ours() -> np.ndarray:
        with MediaFile(film) as media:
            return media.read_audio(5.2, 2.0, 24_000).numpy()

    assert len(ours()) == len(_bare_audio(film, 5.2, 2.0)) == 48_000
    steps: dict[str, Callable[[], Any]] = {"ours": ours, "bare": lambda: _bare_audio(film, 5.2, 2.0)}
    if torchcodec := _torchcodec(film):

        def other() -> Any:
            decoder = torchcodec.AudioDecoder(str(film), sample_rate=24_000, num_channels=1)
            return decoder.get_samples_played_in_range(5.2, 7.2).data[0].numpy()

        assert len(other()) == 48_000
        steps["torchcodec"] = other
    seconds = in_turns(steps, 30)
    what = "2 s of sound, AAC, 44,100 to 24,000 Hz"
    compare(what, "bare PyAV", seconds["ours"], seconds["bare"]).stays_below(1.2)
    if torchcodec:
        compare(what, "torchcodec", seconds["ours"], seconds["torchcodec"])
