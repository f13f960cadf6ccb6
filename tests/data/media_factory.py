"""Write small media files for tests with PyAV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from common.data.listing import NUMBERS, Clip, Listing, file_names
from common.data.sequences import Texts

# Map the suffix of a container to its codecs: (video codec, pixel format, audio codec).
CODECS = {
    ".mp4": ("libx264", "yuv420p", "aac"),
    ".mkv": ("libx264", "yuv420p", "flac"),
    ".avi": ("mpeg4", "yuv420p", "pcm_s16le"),
    ".ts": ("libx264", "yuv420p", "aac"),
    ".flac": ("", "", "flac"),
    ".ogg": ("", "", "vorbis"),
    ".mp3": ("", "", "libmp3lame"),
    ".wav": ("", "", "pcm_s16le"),
}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


def listing_of(root: Path, clips: Sequence[Clip], classes: Sequence[str] = "abc") -> Listing:
    """Make a listing of clips without a data set."""
    numbers = np.array([(clip.label, clip.sound_label, clip.fold, clip.start, clip.end) for clip in clips], NUMBERS)
    names = file_names(os.path.relpath(clip.path, root) for clip in clips)
    sounds = Texts(os.path.relpath(clip.sound, root) if clip.sound else "" for clip in clips)
    return Listing("test", "1", root, tuple(classes), names, numbers, sounds)


def numbered_frames(count: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Make gray frames [count, H, W, 3]. Frame k has gray level 3 * (k mod 80), so tests can recognize the frame."""
    levels = (8 + 3 * (np.arange(count) % 80)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, *size, 3)).copy()


def frame_numbers(frames: npt.NDArray[np.uint8]) -> list[int]:
    """Return the numbers (modulo 80) of frames [T, H, W, 3] that `numbered_frames` made, after decoding."""
    return [round((float(level) - 8) / 3) for level in frames.reshape(len(frames), -1).mean(axis=1)]


def tone(seconds: float, rate: int, frequency: float = 440.0, channels: int = 1) -> npt.NDArray[np.float32]:
    """Make a sine [channels, N] that slowly gets louder, so that tests can tell the time from the loudness."""
    time = np.arange(round(seconds * rate)) / rate
    wave_form = (0.1 + 0.7 * time / max(seconds, 1e-9)) * np.sin(2 * np.pi * frequency * time)
    return np.repeat(wave_form[None].astype(np.float32), channels, axis=0)


def write_video(
    path: Path,
    seconds: float = 2.0,
    fps: float = 25.0,
    size: tuple[int, int] = (32, 48),
    with_audio: bool = True,
    frames: npt.NDArray[np.uint8] | None = None,
    audio: npt.NDArray[np.float32] | None = None,
    audio_rate: int = 16_000,
    key_frame_every: int = 12,
    b_frames: int = 0,
    codec: str | None = None,
) -> Path:
    """Write frames [N, H, W, 3] (default: `numbered_frames`) and sound [channels, N] (default: `tone`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    default_codec, pixel_format, default_audio_codec = CODECS[path.suffix]
    if frames is None:
        frames = numbered_frames(round(seconds * fps), size)
    if audio is None:
        audio = tone(seconds, audio_rate)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream(codec or default_codec, rate=rate)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = pixel_format
        video.codec_context.gop_size = key_frame_every
        video.codec_context.max_b_frames = b_frames
        video.codec_context.thread_count = 1
        if video.codec_context.name == "libx264":
            video.options = {"crf": "10", "preset": "ultrafast"}
        else:
            video.bit_rate = 2_000_000
        sound: Any = None
        if with_audio:
            sound = container.add_stream(default_audio_codec, rate=audio_rate, layout=LAYOUTS[len(audio)])
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            frame.time_base = 1 / rate
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is not None:
            _encode_audio(container, sound, audio, audio_rate)
    return path


def write_audio(path: Path, audio: npt.NDArray[np.float32], audio_rate: int = 16_000) -> Path:
    """Write samples [channels, N] as a sound file; the codec follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            CODECS[path.suffix][2], rate=audio_rate, layout=LAYOUTS[len(audio)], options={"strict": "experimental"}
        )
        _encode_audio(container, stream, audio, audio_rate)
    return path


def write_wav(path: Path, seconds: float = 2.0, rate: int = 16_000, frequency: float = 440.0) -> Path:
    """Write a mono 16-bit tone as a .wav file."""
    return write_audio(path, tone(seconds, rate, frequency), rate)


def _encode_audio(container: Any, stream: Any, samples: npt.NDArray[np.float32], rate: int) -> None:
    layout = LAYOUTS[len(samples)]
    resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
    step = 1024
    for first in range(0, samples.shape[1], step):
        block = np.ascontiguousarray(samples[:, first : first + step].T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
        frame.sample_rate = rate
        frame.pts = first
        frame.time_base = Fraction(1, rate)
        for converted in resampler.resample(frame):
            container.mux(stream.encode(converted))
    container.mux(stream.encode(None))
