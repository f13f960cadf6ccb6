"""Read video and sound from media files with PyAV, cut by time stamp.

Time stamps are reliable; the number of samples a decoder returns before the first one differs between PyAV releases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container.input import InputContainer
from av.filter.graph import Graph
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from common.data.caches import FileCache
from common.data.windows import Limits, select_frames
from common.files import named

# A lossy decoder needs some packets before its output is right, so a seek goes this much further back, or a window
# near the start is decoded from the start.
AUDIO_PREROLL_SECONDS = 0.5
# Some containers round time stamps to milliseconds: only a larger step is a real gap.
AUDIO_GAP_SECONDS = 0.05
# A header with a longer duration is damaged.
LONGEST_SECONDS = 7 * 24 * 3600.0
#: Duration in Matroska: `00:00:09.480000000`.
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
# PyAV's names of the sample types; a final p means planar.
_SAMPLE_TYPES = {
    name + planar: np.dtype(kind)
    for name, kind in (("u8", "u1"), ("s16", "i2"), ("s32", "i4"), ("flt", "f4"), ("dbl", "f8"))
    for planar in ("", "p")
}
# Source samples before and after a window, to settle the resampler's filter.
RESAMPLER_MARGIN = 64


class MediaError(RuntimeError):
    """A media file cannot be read or is too short; the message names the file and the reason."""

    @classmethod
    def of(cls, path: Path, reason: str) -> MediaError:
        return cls(f"{path}: {reason}")


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn any decoder error into a MediaError: damaged files raise anything."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError.of(path, f"cannot be read: {reason}") from error


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """File headers; `frame_size` is height and width in pixels. Without a stream: None, 0 and (0, 0)."""

    video_limits: Limits | None
    audio_limits: Limits | None
    video_fps: float
    frame_size: tuple[int, int]
    audio_rate: int

    @property
    def decoded_bytes(self) -> float:
        video = audio = 0.0
        if self.video_limits is not None:
            frames = (self.video_limits[1] - self.video_limits[0]) * self.video_fps
            video = frames * self.frame_size[0] * self.frame_size[1] * 3
        if self.audio_limits is not None:
            audio = (self.audio_limits[1] - self.audio_limits[0]) * self.audio_rate * 8
        return video + audio


@dataclass(slots=True)
class VideoTrack:
    """All frames of a stream: time stamps [N] in seconds and pixels [N, H, W, 3]."""

    times: npt.NDArray[np.float64]
    frames: npt.NDArray[np.uint8]

    def pick(self, boundaries: npt.NDArray[np.float64], step: float) -> npt.NDArray[np.uint8]:
        """Frames on screen at the wanted times; must equal :func:`_pick_frames`."""
        position = np.searchsorted(self.times, boundaries - step, side="left")
        boundaries, position = boundaries[position < len(self.times)], position[position < len(self.times)]
        held = (self.times[position] >= boundaries) & (position > 0)
        return self.frames[position - held]


@dataclass(slots=True)
class AudioTrack:
    """Decoded sound [N, channels] at the rate of the file and in the decoder's sample type; `start` is in seconds.

    `sample_format` (packed form: "s16", "flt", ...) and `layout` are PyAV's names.
    """

    samples: npt.NDArray[Any]
    rate: int
    start: float
    sample_format: str
    layout: str
    path: Path

    def read(self, start: float, duration: float, sample_rate: int) -> Tensor:
        wanted = round(duration * sample_rate)
        # Round both on the file's clock, to choose the same sample wherever the track begins.
        first = max(round(start * self.rate) - round(self.start * self.rate), 0)
        if sample_rate == self.rate and self.samples.shape[1] == 1 and self.sample_format in ("s16", "flt"):
            window = self._checked(self.samples[first : first + wanted, 0])
            if self.sample_format == "flt":
                # As the resampler converts the sample type.
                window = np.clip(np.rint(window * np.float32(32768.0)), -32768, 32767)
            return torch.from_numpy(window.astype(np.float32)).div_(32767.0)
        # The lead is as close to a whole number of output samples as source samples allow.
        skip = min(-(-RESAMPLER_MARGIN * sample_rate // self.rate), first * sample_rate // self.rate)
        lead = round(skip * self.rate / sample_rate)
        length = -(-wanted * self.rate // sample_rate) + RESAMPLER_MARGIN
        source = self._checked(self.samples[max(first - lead, 0) : first + length])
        with _decoding(self.path):
            window = self._resample(source, sample_rate)
        return torch.from_numpy(window[skip : skip + wanted].astype(np.float32)).div_(32767.0)

    def _checked(self, samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if samples.dtype.kind == "f" and not np.isfinite(samples).all():
            raise MediaError.of(self.path, "its sound has values that are no finite numbers")
        return samples

    def _resample(self, samples: npt.NDArray[Any], sample_rate: int) -> npt.NDArray[np.int16]:
        if not len(samples):
            return np.zeros(0, dtype=np.int16)
        if 1 < samples.shape[1] < 8 and samples.strides[0] == samples.itemsize:
            # Planar, as most decoders return it, and the resampler takes; PyAV supports up to seven channels.
            frame = AudioFrame.from_ndarray(samples.T, format=f"{self.sample_format}p", layout=self.layout)
        else:
            packed = np.ascontiguousarray(samples).reshape(1, -1)
            frame = AudioFrame.from_ndarray(packed, format=self.sample_format, layout=self.layout)
        frame.sample_rate = self.rate
        # As PyAV's resampler, which starts a thread per core.
        graph = Graph()
        graph.threads = 1
        source = graph.add(
            "abuffer", sample_rate=str(self.rate), sample_fmt=frame.format.name, channel_layout=frame.layout.name
        )
        form = graph.add("aformat", sample_rates=str(sample_rate), sample_fmts="s16", channel_layouts="mono")
        graph.link_nodes(source, form, graph.add("abuffersink")).configure()
        graph.push(frame)
        graph.push(None)
        parts: list[npt.NDArray[np.int16]] = []
        while True:
            try:
                parts.append(graph.pull().to_ndarray()[0])
            except EOFError:
                return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int16)


@dataclass(slots=True)
class DecodedMedia:
    info: MediaInfo
    video: VideoTrack | None
    audio: AudioTrack | None

    @property
    def nbytes(self) -> int:
        video = 0 if self.video is None else self.video.frames.nbytes + self.video.times.nbytes
        return video + (0 if self.audio is None else self.audio.samples.nbytes)


class DecodedCache(FileCache[DecodedMedia | None]):
    """Decoded small files in the memory of this process; files larger than the bound are not cached."""

    def get(self, path: Path) -> DecodedMedia | None:
        """The decoded file, or None if it is too large to cache."""
        try:
            key = self._key(path)
        except OSError as error:
            raise MediaError.of(path, error.strerror or str(error)) from None
        found = self._find(key)
        if found is not None:
            if isinstance(found[0], str):
                raise MediaError(found[0])
            return found[0]
        try:
            media = _decode_whole(path, self.max_bytes)
        except MediaError as error:
            self._keep(key, str(error), 0)
            raise
        self._keep(key, media, 0 if media is None else media.nbytes)
        return media


class MediaFile:
    """One open media file. Times are seconds on the file's clock; a rotation in the header is not applied."""

    def __init__(self, path: str | Path, cache: DecodedCache | None = None) -> None:
        self.path = Path(path)
        self._container: InputContainer | None = None
        self._video: VideoStream | None = None
        self._audio: AudioStream | None = None
        self._decoded = cache.get(self.path) if cache is not None else None
        if self._decoded is not None:
            self.info = self._decoded.info
            return
        try:
            self._open()
            with _decoding(self.path):
                self.info = self._read_info()
        except BaseException:
            self.close()
            raise

    @property
    def video_limits(self) -> Limits | None:
        """First and last second of the video stream; None without one."""
        return self.info.video_limits

    @property
    def audio_limits(self) -> Limits | None:
        """First and last second of the audio stream; None without one."""
        return self.info.audio_limits

    @property
    def video_fps(self) -> float:
        return self.info.video_fps

    def read_video(self, start: float, duration: float, fps: float) -> tuple[Tensor, float]:
        """Decode a clip at a given frame rate by repeating or dropping frames, never blending.

        Returns frames [T, H, W, 3] uint8 and the time of the first. T is the duration times `fps`, or less at the end
        of the file.

        Source: docs/papers/avid_cma.md [2.1].
        """
        if self.info.video_limits is None:
            raise MediaError.of(self.path, "has no video stream")
        origin, end = self.info.video_limits
        indices, actual_start = select_frames(start, duration, fps, self.info.video_fps, end, origin)
        if not len(indices):
            raise MediaError.of(self.path, f"no frame between {start:.3f} and {min(start + duration, end):.3f} s")
        step = 1.0 / self.info.video_fps
        # Frames change half a frame before the grid time, because stamps may be rounded.
        boundaries = origin + (indices + np.float64(0.5)) * step
        if self._decoded is not None and self._decoded.video is not None:
            frames = self._decoded.video.pick(boundaries, step)
        else:
            frames = self._read_frames(boundaries, step)
        if not len(frames):
            raise MediaError.of(self.path, f"no video frame could be decoded at {start:.3f} s")
        return torch.from_numpy(frames), actual_start

    def read_audio(self, start: float, duration: float, sample_rate: int) -> Tensor:
        """Decode a window of sound as resampled mono: [N] float32, 16-bit values over 32767; shorter at the file's end.

        Source: docs/papers/avid_cma.md [2.3], step 1.
        """
        if self.info.audio_limits is not None:
            start = max(start, self.info.audio_limits[0])
        return self.decode_audio(start, duration).read(start, duration, sample_rate)

    def decode_audio(self, start: float, duration: float) -> AudioTrack:
        """Decode a window of sound and a small margin at the file's rate, to cut many windows from it."""
        if self.info.audio_limits is None:
            raise MediaError.of(self.path, "has no audio stream")
        if self._decoded is not None and self._decoded.audio is not None:
            return self._decoded.audio
        margin = 2 * RESAMPLER_MARGIN / self.info.audio_rate
        return self._read_track(start - margin, start + duration + margin)

    def close(self) -> None:
        # A stream of a closed container points to freed memory.
        self._video = self._audio = None
        if self._container is not None:
            self._container.close()
            self._container = None

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode_all(self) -> DecodedMedia:
        video = audio = None
        if self.info.video_limits is not None:
            times: list[float] = []
            frames: list[npt.NDArray[np.uint8]] = []
            with _decoding(self.path):
                reformatter = VideoReformatter()
                for time, frame in self._timed_frames(seek_to=None):
                    times.append(time)
                    frames.append(_pixels(frame, reformatter))
                if not frames:
                    raise MediaError.of(self.path, "no video frame could be decoded")
                video = VideoTrack(np.asarray(times), np.stack(frames))
        if self.info.audio_limits is not None:
            audio = self._read_track(-np.inf, np.inf)
        return DecodedMedia(self.info, video, audio)

    # Opening

    def _open(self) -> None:
        self.close()
        with _decoding(self.path), named(self.path):
            # Tags in old files may be invalid text; we do not read them.
            self._container = av.open(str(self.path), mode="r", metadata_errors="ignore")
        self._fresh = True
        self._ends: dict[int, float] = {}
        streams = self._container.streams
        self._video = video_stream(self._container)
        self._audio = streams.audio[0] if streams.audio else None
        for stream in (self._video, self._audio):
            if stream is not None:
                context: Any = stream.codec_context
                if context is None:
                    raise MediaError.of(self.path, "the codec of a stream is not known")
                # Loader processes already use every core.
                context.thread_count = 1

    def _read_info(self) -> MediaInfo:
        video, audio = self._video, self._audio
        if video is None and audio is None:
            raise MediaError.of(self.path, "has neither a video nor an audio stream")
        video_limits = audio_limits = None
        fps = 0.0
        if video is not None:
            fps = float(video.average_rate or video.guessed_rate or video.base_rate or 0)
            if fps <= 0 or not video.codec_context.width or not video.codec_context.height:
                raise MediaError.of(self.path, "the video stream has no frame rate or no size")
            video_limits = self._limits(video)
        if audio is not None:
            if not audio.codec_context.sample_rate:
                raise MediaError.of(self.path, "the audio stream has no sample rate")
            audio_limits = self._limits(audio)
        for limits in (video_limits, audio_limits):
            if limits is not None and not limits[1] - limits[0] < LONGEST_SECONDS:
                raise MediaError.of(self.path, f"claims to last {limits[1] - limits[0]:.0f} s; its header is damaged")
        return MediaInfo(
            video_limits,
            audio_limits,
            fps,
            (video.codec_context.height, video.codec_context.width) if video is not None else (0, 0),
            audio.codec_context.sample_rate if audio is not None else 0,
        )

    def _limits(self, stream: VideoStream | AudioStream) -> Limits:
        container = self._opened()
        base = stream.time_base
        assert base is not None
        if stream.duration:
            start = float((stream.start_time or 0) * base)
            return start, start + float(stream.duration * base)
        start = float(stream.start_time * base) if stream.start_time is not None else 0.0
        if container.duration:
            # Matroska and others store the duration of the whole file; most writers put that of a stream in a tag.
            end = ((container.start_time or 0) + container.duration) / av.time_base
            told = _CLOCK.fullmatch(stream.metadata.get("DURATION", ""))
            own = 3600 * int(told[1]) + 60 * int(told[2]) + float(told[3]) if told else end
            return start, min(own, end) if own > start else end
        # No header has the duration (an unfinished recording): read every packet, once.
        if not self._ends:
            self._fresh = False
            for packet in container.demux([one for one in (self._video, self._audio) if one is not None]):
                if packet.pts is not None and packet.time_base is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    self._ends[packet.stream.index] = max(end, self._ends.get(packet.stream.index, end))
        return start, max(start, self._ends.get(stream.index, start))

    def _opened(self) -> InputContainer:
        if self._container is None:
            raise RuntimeError(f"{self.path} was closed")
        return self._container

    def _rewind(self, stream: VideoStream | AudioStream, seek_to: float | None) -> None:
        """Seek to a key frame at or before a time (None: the beginning), and discard packets of other streams."""
        wanted = stream.index
        if seek_to is None and not self._fresh:
            # Not every container can seek to its beginning, so reopen it.
            self._open()
        self._fresh = False
        for other in self._opened().streams:
            other.discard = Discard.default if other.index == wanted else Discard.all
        if seek_to is not None:
            assert stream.time_base is not None
            self._opened().seek(int(seek_to / stream.time_base), stream=stream, backward=True)

    # Picture

    def _timed_frames(self, seek_to: float | None) -> Iterator[tuple[float, VideoFrame]]:
        self._opened()
        assert self._video is not None
        assert self.info.video_limits is not None
        self._rewind(self._video, seek_to)
        step = 1.0 / self.info.video_fps
        # A frame without a stamp follows the previous one; after a seek the first one could be anywhere.
        following = self.info.video_limits[0] if seek_to is None else np.inf
        for frame in self._opened().decode(self._video):
            time = frame.time
            if time is None:
                time = following
            following = time + step
            yield time, frame

    def _read_frames(self, boundaries: npt.NDArray[np.float64], step: float) -> npt.NDArray[np.uint8]:
        assert self.info.video_limits is not None
        self._opened()
        first = float(boundaries[0]) - 0.5 * step
        seek_to = first if first - self.info.video_limits[0] > step else None
        with _decoding(self.path):
            frames = self._pick_frames(boundaries, step, seek_to)
            if frames is None:
                frames = self._pick_frames(boundaries, step, None)
        assert frames is not None
        return frames

    def _pick_frames(
        self, boundaries: npt.NDArray[np.float64], step: float, seek_to: float | None
    ) -> npt.NDArray[np.uint8] | None:
        """Decode until every wanted time has its frame.

        For a boundary b: the first frame in [b - step, b), else the last one before it, else the first. None if a seek
        missed the first wanted frame or reached a part that cannot be decoded (the last group of pictures in MPEG).
        """
        limits = boundaries.tolist()
        lows = (boundaries - step).tolist()
        reformatter = VideoReformatter()
        chosen: list[npt.NDArray[np.uint8]] = []
        previous: VideoFrame | None = None
        converted: tuple[VideoFrame, npt.NDArray[np.uint8]] | None = None

        def take(frame: VideoFrame) -> None:
            nonlocal converted
            if converted is None or converted[0] is not frame:
                converted = (frame, _pixels(frame, reformatter))
            chosen.append(converted[1])

        for time, frame in self._timed_frames(seek_to):
            if previous is None and seek_to is not None and limits[0] <= time:
                return None
            while len(chosen) < len(limits) and limits[len(chosen)] <= time:
                take(previous if previous is not None else frame)
            while len(chosen) < len(limits) and lows[len(chosen)] <= time:
                take(frame)
            if len(chosen) == len(limits):
                break
            previous = frame
        if previous is None and not chosen and seek_to is not None:
            return None
        return np.stack(chosen) if chosen else np.zeros((0, *self.info.frame_size, 3), dtype=np.uint8)

    # Sound

    def _read_track(self, start: float, end: float) -> AudioTrack:
        assert self.info.audio_limits is not None
        seek_to = start - AUDIO_PREROLL_SECONDS
        with _decoding(self.path):
            track = None
            # After a seek, FFmpeg gives packets of an Ogg file's last page wrong stamps.
            seekable = self._opened().format.name != "ogg"
            if seekable and self.info.audio_limits[0] + AUDIO_PREROLL_SECONDS < seek_to:
                track = self._collect_audio(start, end, seek_to)
            if track is None:
                track = self._collect_audio(start, end, None)
        if track is None:
            raise MediaError.of(self.path, f"no sound could be decoded at {max(start, 0.0):.3f} s")
        return track

    def _collect_audio(self, start: float, end: float, seek_to: float | None) -> AudioTrack | None:
        self._opened()
        assert self._audio is not None
        assert self.info.audio_limits is not None
        self._rewind(self._audio, seek_to)
        parts: list[npt.NDArray[Any]] = []
        anchor, collected, rate = 0.0, 0, 0
        following = self.info.audio_limits[0] if seek_to is None else np.inf
        frame: AudioFrame | None = None
        for frame in self._opened().decode(self._audio):
            rate = rate or frame.sample_rate
            if frame.sample_rate != rate:
                raise MediaError.of(self.path, f"the sample rate changes from {rate} to {frame.sample_rate}")
            time = frame.time if frame.time is not None else following
            following = time + frame.samples / rate
            if following <= start:
                continue
            samples = _samples(frame)
            if not parts:
                if seek_to is not None and time > start:
                    return None
                anchor = time
            gap = round((time - anchor) * rate) - collected
            if gap > AUDIO_GAP_SECONDS * rate:
                if time >= min(end, self.info.audio_limits[1] + 1.0):
                    break  # A stamp beyond the stream: ignore the rest.
                parts.append(np.zeros((gap, samples.shape[1]), samples.dtype))
                collected += len(parts[-1])
            elif -gap > AUDIO_GAP_SECONDS * rate:
                samples = samples[-gap:]
            parts.append(samples)
            collected += len(samples)
            if following >= end:
                break
        if not parts or frame is None:
            return None
        channels = parts[0].shape[1]
        layout = {1: "mono", 2: "stereo"}.get(channels, frame.layout.name)
        return AudioTrack(np.concatenate(parts), rate, anchor, frame.format.packed.name, layout, self.path)


def _pixels(frame: VideoFrame, reformatter: VideoReformatter) -> npt.NDArray[np.uint8]:
    # By default it starts a thread per core, in every loader process.
    pixels: Any = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return pixels


def _samples(frame: AudioFrame) -> npt.NDArray[Any]:
    """Samples [N, channels] of a frame, without the overhead of `to_ndarray`."""
    channels, planar = frame.layout.nb_channels, frame.format.is_planar
    count, dtype = frame.samples, _SAMPLE_TYPES[frame.format.name]
    if not planar:
        return np.frombuffer(memoryview(frame.planes[0]), dtype, count * channels).reshape(-1, channels).copy()
    samples = np.empty((channels, count), dtype)
    # For eight channels (7.1) PyAV lists a ninth plane.
    for row, plane in zip(samples, frame.planes[:channels], strict=True):
        row[:] = np.frombuffer(memoryview(plane), dtype, count)
    return samples.T


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream that is not cover art."""
    films = (stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic)
    return next(films, None)


def probe(path: str | Path) -> MediaInfo:
    with MediaFile(path) as media:
        return media.info


def _decode_whole(path: Path, max_bytes: int) -> DecodedMedia | None:
    with MediaFile(path) as media:
        return media.decode_all() if media.info.decoded_bytes <= max_bytes else None
