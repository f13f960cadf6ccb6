"""Map-style data sets of clips cut from media files; see :mod:`common.data.item_dataset` for keys and seeds."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.item_dataset import ItemDataset, Key, Sample
from common.data.listing import Clip, Listing
from common.data.media import DecodedCache, MediaError, MediaFile
from common.data.transforms import AudioTransform, VideoTransform
from common.data.windows import (
    Limits,
    clip_start,
    dense_clip_starts,
    excerpt_start,
    frame_count,
    paired_window,
    restrict,
    wrapping_indices,
    wrapping_starts,
)

#: Least seconds between an excerpt and the end of the file.
_EXCERPT_MARGIN = 0.1


class ClipDataset(ItemDataset):
    """Media files, decoded or from this process's cache; subclasses cut the sample.

    Args:
        clips_per_video: length of an epoch in passes over the listing; item i is file `i mod len(listing)`.
        cache_bytes: bound of the decoded files in memory, per process; 0 = no cache.

    Source: docs/papers/avid_cma.md [2.1].
    """

    def __init__(
        self,
        listing: Listing,
        *,
        clips_per_video: int = 1,
        seed: int = 0,
        max_skipped_fraction: float = 0.05,
        cache_bytes: int = 0,
    ) -> None:
        super().__init__(listing, passes=clips_per_video, seed=seed, max_skipped_fraction=max_skipped_fraction)
        self.cache = DecodedCache.shared(cache_bytes) if cache_bytes else None

    @abstractmethod
    def _sample(self, clip: Clip, rng: np.random.Generator) -> Sample:
        """Cut the sample of a clip."""

    def _make(self, file: int, rng: np.random.Generator) -> Sample:
        return self._sample(self.listing[file], rng)

    def fill_cache(self) -> None:
        if self.cache is not None:
            files = (path for clip in self.listing.clips for path in (clip.path, clip.sound) if path is not None)
            self.cache.fill(files, MediaError)

    def preview(self, item: int) -> npt.NDArray[np.uint8]:
        """The middle frame of a file as it is stored, [H, W, 3]."""
        clip = self.listing[item]
        with self._opened(clip) as media:
            start, end = _video_limits(media, clip)
            frames, _ = media.read_video((start + end) / 2, 1.5 / media.video_fps, media.video_fps)
        return frames[0].numpy()

    def _opened(self, clip: Clip) -> MediaFile:
        return MediaFile(clip.path, self.cache)

    def _sound_of(self, clip: Clip, media: MediaFile) -> contextlib.AbstractContextManager[MediaFile]:
        return contextlib.nullcontext(media) if clip.sound is None else MediaFile(clip.sound, self.cache)


class AudioVisualClips(ClipDataset):
    """A video clip and an audio clip from about the same moment of a file; skips files without sound.

    Args:
        video_transform: None = no "video" in the samples, and the picture is not decoded.
        jitter: how far, in seconds, the video clip may extend past the audio clip on either side, in training.
    Returns of an item:
        `video` [3, T, crop, crop], `audio` [1, frames, bins], `index` (file of the listing), `label`, `sound_label`,
        `skipped` (files passed over to get this sample).

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
        self.video_transform = (
            None
            if video_transform is None
            else video_transform.adapted(training, frame_count(video_duration, video_fps))
        )
        self.audio_transform = audio_transform.with_training(training)
        self.video_duration = video_duration
        self.video_fps = video_fps
        self.jitter = jitter if training else 0.0

    def decibels(self, key: Key) -> Tensor:
        """Spectrogram of an item's audio clip before augmentation and normalization, [1, frames, bins]."""

        def make(file: int, rng: np.random.Generator) -> Sample:
            clip = self.listing[file]
            with self._opened(clip) as media, self._sound_of(clip, media) as sound:
                _, samples = self._cut(media, sound, clip, rng, with_video=False)
            return {"audio": self.audio_transform.decibels(self.audio_transform.prepare(samples))}

        return self._usable(key, make)["audio"]

    def _sample(self, clip: Clip, rng: np.random.Generator) -> Sample:
        with self._opened(clip) as media, self._sound_of(clip, media) as sound:
            frames, samples = self._cut(media, sound, clip, rng, with_video=self.video_transform is not None)
        sample: Sample = {}
        if self.video_transform is not None and frames is not None:
            sample["video"] = self.video_transform(frames, rng)
        sample["audio"] = self.audio_transform(samples, rng)
        sample["sound_label"] = torch.tensor(clip.sound_label)
        return sample

    def _cut(
        self, media: MediaFile, sound: MediaFile, clip: Clip, rng: np.random.Generator, with_video: bool
    ) -> tuple[Tensor | None, Tensor]:
        if media.video_limits is None:
            raise MediaError.of(clip.path, "has no video stream")
        if sound.audio_limits is None:
            raise MediaError.of(sound.path, "has no audio stream")
        video = restrict(media.video_limits, clip.start, clip.end)
        audio = restrict(sound.audio_limits, clip.start, clip.end)
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
        frames, audio_start = None, window.audio_start
        if with_video:
            frames, actual_start = media.read_video(window.video_start, self.video_duration, self.video_fps)
            # Frames lie on a grid; the sound moves with them.
            audio_start += actual_start - window.video_start
        samples = sound.read_audio(audio_start, audio_duration, self.audio_transform.sample_rate)
        if not len(samples):
            raise MediaError.of(sound.path, f"no sound could be decoded at {audio_start:.3f} s")
        return frames, samples


class VideoClips(ClipDataset):
    """One random clip per item, without sound.

    The time of the clip is random in evaluation as well ("Clip@1"); `training` only augments.

    Returns of an item:
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

    def _sample(self, clip: Clip, rng: np.random.Generator) -> Sample:
        with self._opened(clip) as media:
            limits = _video_limits(media, clip)
            start = clip_start(limits, self.video_duration, float(rng.random()))
            duration = min(self.video_duration, limits[1] - limits[0])
            frames, _ = media.read_video(start, duration, self.video_fps)
        return {"video": self.video_transform(frames, rng)}


class DenseVideoClips(ClipDataset):
    """Several clips of one video, evenly spaced ("Video@1") or with `random_starts` ("Clip@1"), in evaluation mode.

    Returns of an item:
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
        video_duration: float = 0.5,
        video_fps: float = 16.0,
        seed: int = 0,
        max_skipped_fraction: float = 0.05,
        cache_bytes: int = 0,
    ) -> None:
        super().__init__(listing, seed=seed, max_skipped_fraction=max_skipped_fraction, cache_bytes=cache_bytes)
        self.video_transform = video_transform.adapted(False, frame_count(video_duration, video_fps))
        self.clips = clips
        self.random_starts = random_starts
        self.video_duration = video_duration
        self.video_fps = video_fps

    def _sample(self, clip: Clip, rng: np.random.Generator) -> Sample:
        with self._opened(clip) as media:
            start, end = _video_limits(media, clip)
            frames, _ = media.read_video(start, end - start, self.video_fps)
        length = frame_count(self.video_duration, self.video_fps)
        if self.random_starts:
            chosen = rng.integers(0, max(len(frames) - length, 0) + 1, self.clips)
        else:
            chosen = dense_clip_starts(len(frames), length, self.clips)
        starts = torch.from_numpy(chosen)
        # Clips may share or skip frames; short clips loop.
        steps = torch.arange(self.video_transform.frames) % min(length, len(frames))
        used, places = torch.unique(starts[:, None] + steps, return_inverse=True)
        pixels = self.video_transform.without_padding(frames[used])
        return {"video": pixels[:, places].transpose(0, 1).contiguous()}


class SoundWindows(ClipDataset):
    """Several windows of each sound file, for a linear classifier on audio features.

    With `wrap_seconds` (ESC-50) windows start anywhere in the first seconds of the file and wrap around. Without it
    (DCASE) a training window is the beginning of an excerpt of `excerpt_seconds`, and test windows are spread over the
    file. In training, `speed` scales the decoding rate; samples are treated as if it were 1.

    Returns of an item:
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
        speed: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0),
        seed: int = 0,
        max_skipped_fraction: float = 0.05,
        cache_bytes: int = 0,
    ) -> None:
        super().__init__(listing, seed=seed, max_skipped_fraction=max_skipped_fraction, cache_bytes=cache_bytes)
        self.audio_transform = audio_transform.with_training(training)
        self.training = training
        self.windows = windows
        self.wrap_seconds = wrap_seconds
        self.excerpt_seconds = excerpt_seconds
        self.speed = speed

    def _sample(self, clip: Clip, rng: np.random.Generator) -> Sample:
        with MediaFile(clip.sound or clip.path, self.cache) as media:
            if media.audio_limits is None:
                raise MediaError.of(media.path, "has no audio stream")
            limits = restrict(media.audio_limits, clip.start, clip.end)
            if self.wrap_seconds is not None:
                limits = (limits[0], min(limits[1], limits[0] + self.wrap_seconds))
            if limits[1] <= limits[0]:
                raise MediaError.of(clip.path, "has no sound within the listed limits")
            cut = self._training_windows if self.training else self._test_windows
            windows = [self.audio_transform(samples, rng) for samples in cut(media, limits, rng)]
        return {
            "audio": torch.stack(windows),
            "sound_label": torch.tensor(clip.sound_label),
            "fold": torch.tensor(clip.fold),
        }

    def _training_windows(self, media: MediaFile, limits: Limits, rng: np.random.Generator) -> Iterator[Tensor]:
        rate = self.audio_transform.sample_rate
        whole = media.decode_audio(limits[0], limits[1] - limits[0]) if self.wrap_seconds is not None else None
        for _ in range(self.windows):
            draws = rng.random(2)
            decode_rate = round(rate * (self.speed[0] + draws[0] * (self.speed[1] - self.speed[0])))
            if whole is not None:
                seconds = limits[1] - limits[0]
                samples = whole.read(limits[0], seconds, decode_rate)
                first = int(draws[1] * seconds * decode_rate)
            else:
                start = excerpt_start(limits, self.excerpt_seconds, _EXCERPT_MARGIN, float(draws[1]))
                seconds = min(self.excerpt_seconds, limits[1] - start)
                samples, first = media.read_audio(start, seconds, decode_rate), 0
            yield self._wrapped(media, samples, first)

    def _test_windows(self, media: MediaFile, limits: Limits, rng: np.random.Generator) -> Iterator[Tensor]:
        rate = self.audio_transform.sample_rate
        seconds = limits[1] - limits[0]
        samples = media.read_audio(limits[0], seconds, rate)
        for start in wrapping_starts(seconds, self.windows):
            yield self._wrapped(media, samples, int(start * rate))

    def _wrapped(self, media: MediaFile, samples: Tensor, first: int) -> Tensor:
        if not len(samples):
            raise MediaError.of(media.path, "no sound could be decoded")
        count = self.audio_transform.num_samples
        if first + count <= len(samples):
            return samples[first : first + count]
        return samples[torch.from_numpy(wrapping_indices(len(samples), first, count))]


def _video_limits(media: MediaFile, clip: Clip) -> Limits:
    if media.video_limits is None:
        raise MediaError.of(clip.path, "has no video stream")
    limits = restrict(media.video_limits, clip.start, clip.end)
    if limits[1] <= limits[0]:
        raise MediaError.of(clip.path, "has no picture within the listed limits")
    return limits
