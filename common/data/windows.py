"""When to cut: clip windows and frames as pure functions of stream limits and uniform draws in [0, 1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Limits = tuple[float, float]


@dataclass(frozen=True, slots=True)
class PairedWindow:
    """Start of a video clip and of its audio clip, in seconds."""

    video_start: float
    audio_start: float


def between(low: float, high: float, draw: float) -> float:
    """Map a uniform draw in [0, 1) to [low, high)."""
    return low + draw * (high - low)


def restrict(limits: Limits, start: float | None, end: float | None) -> Limits:
    """Limits of a listed segment inside a stream; None keeps the stream's limit."""
    return (
        limits[0] if start is None else max(limits[0], start),
        limits[1] if end is None else min(limits[1], end),
    )


def paired_window(
    video_limits: Limits,
    audio_limits: Limits,
    video_duration: float,
    audio_duration: float,
    jitter: float,
    draws: tuple[float, float],
) -> PairedWindow | None:
    """Starts of a video clip and an audio clip from about the same moment, or None if the streams are too short.

    The longer clip is placed first, where both streams last long enough. The shorter clip lies within it, widened by
    `jitter` seconds on both sides; it starts within its stream and may run past its end. The first draw is for the
    longer.

    Source: docs/papers/avid_cma.md [2.1].
    """
    swap = audio_duration <= video_duration
    outer_limits, inner_limits = (video_limits, audio_limits) if swap else (audio_limits, video_limits)
    outer, inner = (video_duration, audio_duration) if swap else (audio_duration, video_duration)
    low = max(outer_limits[0], inner_limits[0])
    high = min(outer_limits[1] - outer, inner_limits[1] - inner)
    if high <= low:
        return None
    outer_start = between(low, high, draws[0])
    low = max(outer_start - jitter, inner_limits[0])
    high = min(outer_start + outer + jitter - inner, inner_limits[1])
    inner_start = between(low, high, draws[1])
    return PairedWindow(outer_start, inner_start) if swap else PairedWindow(inner_start, outer_start)


def clip_start(limits: Limits, duration: float, draw: float) -> float:
    """Start of a random clip; the start of the stream if it is shorter than the clip.

    Source: docs/papers/avid_cma.md [2.1], evaluation without audio.
    """
    return between(limits[0], max(limits[1] - duration, limits[0]), draw)


def frame_count(duration: float, video_fps: float) -> int:
    """Frames of a clip; rounds so that 0.29 s at 100 frames per second are 29, though the float product is less."""
    return int(duration * video_fps + 1e-6)


def select_frames(
    start: float, duration: float, video_fps: float, source_fps: float, end: float, origin: float = 0.0
) -> tuple[npt.NDArray[np.int64], float]:
    """Choose source frames for a clip at another rate: indices [T] from `origin` on, and the time of the first.

    Wanted times are `start`, `start + 1/video_fps`, ...; each takes the source frame on screen at that time, so a frame
    may repeat. Times stop half a source frame before the end of the clip or stream, and at `frame_count`. `end` and
    `origin` are the last second of the stream and the time of its frame 0.

    Source: docs/papers/avid_cma.md [2.1].
    """
    count = frame_count(duration, video_fps)
    times = start + np.arange(count) / video_fps
    # The time of a frame may be rounded to just before it.
    slack = 1e-6
    times = times[times < min(start + duration - 0.5 / source_fps, end - slack / source_fps)]
    indices = np.floor((times - origin) * source_fps + slack).astype(np.int64)
    actual = origin + int(indices[0]) / source_fps if len(indices) else start
    return indices, actual


def dense_clip_starts(num_frames: int, clip_frames: int, clips: int) -> npt.NDArray[np.int64]:
    """First frame of each clip of a dense evaluation; all zero if the video is not longer than a clip.

    Source: docs/papers/avid_cma.md [10.1] ("Video@1").
    """
    if num_frames <= clip_frames:
        return np.zeros(clips, dtype=np.int64)
    return np.linspace(0, max(num_frames - clip_frames, 1), clips).astype(np.int64)


def excerpt_start(limits: Limits, seconds: float, margin: float, draw: float) -> float:
    """Start of a random sound excerpt that ends at least `margin` seconds before the file does.

    Source: docs/papers/avid_cma.md [10.3] (DCASE: 4 s excerpts, start in [start, end - 4.1]).
    """
    return clip_start(limits, seconds + margin, draw)


def wrapping_starts(seconds: float, windows: int) -> npt.NDArray[np.float64]:
    """Evenly spaced starts of a sound's test windows, both ends included; windows past the end wrap around.

    Source: docs/papers/avid_cma.md [10.3].
    """
    return np.linspace(0.0, seconds, windows)


def wrapping_indices(num_samples: int, first: int, count: int) -> npt.NDArray[np.int64]:
    """Sample indices of a window that wraps around at the end of the sound."""
    if num_samples < 1:
        raise ValueError("a window cannot wrap round an empty sound")
    return (first + np.arange(count)) % num_samples
