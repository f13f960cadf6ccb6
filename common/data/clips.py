"""Map-style data sets of clips cut from media files; see :mod:`common.data.item_dataset` for keys and seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.item_dataset import Item, ItemDataset, Sample, together
from common.data.listing import Clip, Listing
from common.data.media import (
    FileCache,
    FrameFolder,
    Limits,
    MediaError,
    MediaFile,
    Pixels,
    frame_count,
    open_media,
    restrict,
)
from common.data.transforms import AudioTransform, VideoTransform

#: Seconds that an excerpt must end before the end of the file.
_EXCERPT_MARGIN = 0.1
#: Training scales the sample rate by a random factor in this range.
SPEED = (3.0 / 4.0, 4.0 / 3.0)


def clip_start(limits: Limits, duration: float, draw: float) -> float:
    """Choose a clip's start; `draw` is uniform in [0, 1). If the stream is too short, return the stream's start.

    Source: docs/papers/avid_cma.md [2.1], evaluation without audio.
    """
    return limits[0] + draw * max(limits[1] - duration - limits[0], 0.0)


def paired_window(
    video_limits: Limits,
    audio_limits: Limits,
    video_duration: float,
    audio_duration: float,
    jitter: float,
    draws: tuple[float, float],
) -> tuple[float, float] | None:
    """Choose the starts of a video and an audio clip at about the same moment. Return None if a stream is too short.

    The longer clip is placed first, where both streams last long enough. The shorter clip is placed within the longer
    clip's time, extended by `jitter` seconds on both sides. The shorter clip starts within its stream, but may run past
    the stream's end. `draws` holds two uniform numbers in [0, 1). The first places the longer clip, the second the
    shorter.

    Source: docs/papers/avid_cma.md [2.1].
    """
    swap = audio_duration <= video_duration
    outer_limits, inner_limits = (video_limits, audio_limits) if swap else (audio_limits, video_limits)
    outer, inner = (video_duration, audio_duration) if swap else (audio_duration, video_duration)
    low = max(outer_limits[0], inner_limits[0])
    high = min(outer_limits[1] - outer, inner_limits[1] - inner)
    if high <= low:
        return None
    outer_start = low + draws[0] * (high - low)
    low = max(outer_start - jitter, inner_limits[0])
    high = min(outer_start + outer + jitter - inner, inner_limits[1])
    inner_start = low + draws[1] * (high - low)
    return (outer_start, inner_start) if swap else (inner_start, outer_start)


def dense_clip_starts(num_frames: int, clip_frames: int, clips: int) -> npt.NDArray[np.int64]:
    """Return the first frame of each of `clips` evenly spaced clips. All are 0 if the video isn't longer than a clip.

    Source: docs/papers/avid_cma.md [10.1] ("Video@1").
    """
    return np.linspace(0, max(num_frames - clip_frames, 0), clips).astype(np.int64)


def repeated(samples: Tensor, first: int, count: int) -> Tensor:
    """Return `count` samples from position `first`. After the last sample, continue with the first."""
    return samples[(first + torch.arange(count)) % len(samples)]


class ClipDataset(ItemDataset):
    """Base class that reads media files or folders of frames, optionally with a cache. Subclasses cut the clips.

    Args:
        clips_per_video: how often an epoch visits each file; item i is file `i mod len(listing)`.
        cache_bytes: memory for decoded files per process; 0 = no cache.

    Source: docs/papers/avid_cma.md [2.1].
    """

    def __init__(
        self,
        listing: Listing,
        *,
        clips_per_video: int = 1,
        cache_bytes: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(listing, passes=clips_per_video, **options)
        self.cache = FileCache.shared(cache_bytes)

    def fill_cache(self) -> None:
        if self.cache is not None:
            files = (path for clip in self.listing for path in (clip.path, clip.sound) if path is not None)
            self.cache.fill(dict.fromkeys(files), self._decode)

    def _decode(self, path: Path) -> None:
        with open_media(path, self.cache) as media:
            if isinstance(media, FrameFolder):
                media.fill_cache()

    def preview(self, item: int) -> Pixels:
        """Return the middle frame of a file at its stored size, [H, W, 3]."""
        clip = self.listing[item]
        with open_media(clip.path, self.cache) as media:
            start, end = limits_of(media.video_limits, clip, "video")
            frames, _ = media.read_video((start + end) / 2, 1.5 / media.video_fps, media.video_fps)
        return frames[0].numpy()


class AudioVisualClips(ClipDataset):
    """Cuts a video and an audio clip from about the same moment of a file; skips files without sound.

    Args:
        video_transform: None leaves "video" out of the samples and decodes no pictures.
        jitter: in training, how many seconds the video clip may extend past the audio clip on either side.
    An item holds:
        `video` [3, T, crop, crop], `audio` [1, frames, bins], `label`, `sound_label`, `index` (the file's position in
        the listing), `skipped` (number of unusable files skipped before this one).

    Source: docs/papers/avid_cma.md [2.1].
    """

    def __init__(
        self,
        listing: Listing,
        video_transform: VideoTransform | None,
        audio_transform: AudioTransform,
        *,
        video_duration: float = 0.5,
        video_fps: float = 16.0,
        jitter: float = 0.5,
        training: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.training = training
        frames = frame_count(video_duration, video_fps)
        self.video_transform = None if video_transform is None else video_transform.adapted(training, frames)
        self.audio_transform = audio_transform.with_training(training)
        self.video_duration = video_duration
        self.video_fps = video_fps
        self.jitter = jitter if training else 0.0

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        clip = self.listing[item.file]
        with (
            MediaFile(clip.path, self.cache) as media,
            contextlib.nullcontext(media) if clip.sound is None else MediaFile(clip.sound, self.cache) as sound,
        ):
            video = limits_of(media.video_limits, clip, "video")
            audio = limits_of(sound.audio_limits, clip, "audio")
            audio_duration = self.audio_transform.window
            draws = rng.random(2)
            window = paired_window(
                video, audio, self.video_duration, audio_duration, self.jitter, (float(draws[0]), float(draws[1]))
            )
            if window is None:
                raise MediaError.of(
                    clip.path,
                    f"too short: video {video[0]:.2f} to {video[1]:.2f} s, audio {audio[0]:.2f} to {audio[1]:.2f} s, "
                    f"wanted {self.video_duration:g} s and {audio_duration:g} s",
                )
            video_start, audio_start = window
            if self.video_transform is not None:
                frames, actual_start = media.read_video(video_start, self.video_duration, self.video_fps, video[1])
                # The clip starts at a whole frame; shift the sound by the same time.
                audio_start += actual_start - video_start
            samples = sound.read_audio(audio_start, audio_duration, self.audio_transform.sample_rate)
        sample: Sample = {}
        if self.video_transform is not None:
            sample["video"] = frames, self.video_transform.draw(rng)
        sample["audio"] = samples, self.audio_transform.draw(rng)
        sample["sound_label"] = torch.tensor(clip.sound_label)
        return sample

    def transform(self, batch: list[Sample]) -> None:
        if self.video_transform is not None:
            together(batch, "video", self.video_transform.together)
        together(batch, "audio", self.audio_transform.together)


class VideoClips(ClipDataset):
    """Cuts one random clip per item, without sound.

    The clip's time is random in evaluation too ("Clip@1"); `training` only turns on augmentation.

    An item holds:
        `video` [3, T, crop, crop], `label`, `index`, `skipped`.

    Source: docs/papers/avid_cma.md [2.1], [10.1], [10.2].
    """

    def __init__(
        self,
        listing: Listing,
        video_transform: VideoTransform,
        *,
        video_duration: float = 0.5,
        video_fps: float = 16.0,
        training: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.training = training
        self.video_transform = video_transform.adapted(training, frame_count(video_duration, video_fps))
        self.video_duration = video_duration
        self.video_fps = video_fps

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        clip = self.listing[item.file]
        with MediaFile(clip.path, self.cache) as media:
            limits = limits_of(media.video_limits, clip, "video")
            start = clip_start(limits, self.video_duration, float(rng.random()))
            duration = min(self.video_duration, limits[1] - limits[0])
            frames, _ = media.read_video(start, duration, self.video_fps)
        return {"video": (frames, self.video_transform.draw(rng))}

    def transform(self, batch: list[Sample]) -> None:
        together(batch, "video", self.video_transform.together)


class DenseVideoClips(VideoClips):
    """Cuts several clips of each video: evenly spaced for "Video@1", or with random starts for "Clip@1".

    An item holds:
        `video` [clips, 3, T, crop, crop], `label`, `index`, `skipped`.

    Source: docs/papers/avid_cma.md [10.1].
    """

    def __init__(
        self,
        listing: Listing,
        video_transform: VideoTransform,
        *,
        clips: int = 10,
        random_starts: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(listing, video_transform, training=False, **options)
        self.frames = self.video_transform.frames
        self.video_transform = replace(self.video_transform, frames=0)  # `read` loops short clips
        self.clips = clips
        self.random_starts = random_starts

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        clip = self.listing[item.file]
        with MediaFile(clip.path, self.cache) as media:
            start, end = limits_of(media.video_limits, clip, "video")
            frames, _ = media.read_video(start, end - start, self.video_fps)
        length = frame_count(self.video_duration, self.video_fps)
        if self.random_starts:
            chosen = rng.integers(0, max(len(frames) - length, 0) + 1, self.clips)
        else:
            chosen = dense_clip_starts(len(frames), length, self.clips)
        starts = torch.from_numpy(chosen)
        # Clips may overlap or leave gaps; a short clip repeats its frames.
        steps = torch.arange(self.frames) % min(length, len(frames))
        used, places = torch.unique(starts[:, None] + steps, return_inverse=True)
        return {"video": (frames[used], places)}

    def transform(self, batch: list[Sample]) -> None:
        for sample in batch:
            frames, places = sample["video"]
            sample["video"] = self.video_transform(frames)[:, places].transpose(0, 1).contiguous()


class SoundWindows(ClipDataset):
    """Cuts several windows of each sound file, for a linear classifier on audio features.

    With `wrap_seconds` (ESC-50), only the first `wrap_seconds` of a file are used. A window starts anywhere in that
    part and wraps around at its end. Without `wrap_seconds` (DCASE), training windows start at random, and test windows
    are evenly spaced over the file. Training also changes speed and pitch by a random factor in `SPEED`.

    An item holds:
        `audio` [windows, 1, frames, bins], `label`, `sound_label`, `fold`, `index`, `skipped`.

    Source: docs/papers/avid_cma.md [10.3].
    """

    def __init__(
        self,
        listing: Listing,
        audio_transform: AudioTransform,
        *,
        training: bool,
        windows: int = 10,
        wrap_seconds: float | None = None,
        excerpt_seconds: float = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.audio_transform = audio_transform.with_training(training)
        self.training = training
        self.windows = windows
        self.wrap_seconds = wrap_seconds
        self.excerpt_seconds = excerpt_seconds

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        clip = self.listing[item.file]
        with MediaFile(clip.sound or clip.path, self.cache) as media:
            limits = limits_of(media.audio_limits, clip, "audio")
            if self.wrap_seconds is not None:
                limits = (limits[0], min(limits[1], limits[0] + self.wrap_seconds))
            cut = self._training_windows if self.training else self._test_windows
            # Draw windows and volumes alternately, as in recorded runs.
            windows, draws = zip(*((samples, self.audio_transform.draw(rng)) for samples in cut(media, limits, rng)))
        return {
            "audio": (torch.stack(windows), draws),
            "sound_label": torch.tensor(clip.sound_label),
            "fold": torch.tensor(clip.fold),
        }

    def transform(self, batch: list[Sample]) -> None:
        windows, draws = (list(chain.from_iterable(parts)) for parts in zip(*(sample["audio"] for sample in batch)))
        spectrograms = self.audio_transform.together(windows, draws)
        for number, sample in enumerate(batch):
            sample["audio"] = torch.stack(spectrograms[number * self.windows : (number + 1) * self.windows])

    def _training_windows(self, media: MediaFile, limits: Limits, rng: np.random.Generator) -> Iterator[Tensor]:
        rate = self.audio_transform.sample_rate
        seconds = limits[1] - limits[0]
        whole = media.decode_audio(limits[0], seconds) if self.wrap_seconds is not None else None
        for _ in range(self.windows):
            draws = rng.random(2)
            decode_rate = round(rate * (SPEED[0] + draws[0] * (SPEED[1] - SPEED[0])))
            if whole is not None:
                samples = whole.read(limits[0], seconds, decode_rate)
                first = int(draws[1] * seconds * decode_rate)
            else:
                start = clip_start(limits, self.excerpt_seconds + _EXCERPT_MARGIN, float(draws[1]))
                samples = media.read_audio(start, min(self.excerpt_seconds, limits[1] - start), decode_rate)
                first = 0
            yield repeated(samples, first, self.audio_transform.num_samples)

    def _test_windows(self, media: MediaFile, limits: Limits, rng: np.random.Generator) -> Iterator[Tensor]:
        rate = self.audio_transform.sample_rate
        seconds = limits[1] - limits[0]
        samples = media.read_audio(limits[0], seconds, rate)
        for start in np.linspace(0.0, seconds, self.windows):
            yield repeated(samples, int(start * rate), self.audio_transform.num_samples)


def limits_of(stream: Limits | None, clip: Clip, kind: str) -> Limits:
    """Return the first and last second of the part of a stream that belongs to a clip."""
    if stream is None:
        raise MediaError.of(clip.path, f"has no {kind} stream")
    limits = restrict(stream, clip.start, clip.end)
    if limits[1] <= limits[0]:
        raise MediaError.of(clip.path, f"has no {kind} within the listed limits")
    return limits
