"""Read pictures with Pillow, and cut clips from video and sound with PyAV.

Clips are cut by time stamps, because PyAV releases differ in how many samples the decoder returns first.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

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
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.files import open_regular, parsing

Limits = tuple[float, float]
Pixels = npt.NDArray[np.uint8]
Item = TypeVar("Item")
# What a cache holds: a decoded picture, or a decoded media file.
Content = TypeVar("Content", bound="Image.Image | DecodedMedia")

# A lossy decoder's first output is wrong, so seek this much further back.
AUDIO_PREROLL_SECONDS = 0.5
# Some containers round time stamps to milliseconds, so only a larger step is a real gap.
AUDIO_GAP_SECONDS = 0.05
# A header that claims a week or more is damaged.
LONGEST_SECONDS = 604_800.0
#: A duration in Matroska, such as `00:00:09.480000000`.
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
#: Formats that contain their media. Playlists and scripts are left out, because they name other files and addresses.
CONTAINERS = (
    "aac,ac3,aiff,amr,asf,au,avi,caf,dv,flac,flv,gif,h264,hevc,ivf,m4v,matroska,mov,mp3,mpeg,mpegts,mpegvideo,mxf,nut,"
    "ogg,rm,w64,wav,wv"
)
#: Other formats are left out: EPS, for example, starts a program.
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# PyAV's names of the sample types.
_SAMPLE_TYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "flt": "f4", "dbl": "f8"}
# Source samples read before and after a window, so that the resampler's filter settles.
RESAMPLER_MARGIN = 64
_NUMBERED = re.compile(r"(?:.*\D)?0*(\d+)\.(?:jpe?g|png)", re.IGNORECASE)


class MediaError(RuntimeError):
    """A file cannot be read or is too short; the message names the file and the reason."""

    @classmethod
    def of(cls, path: Path, reason: str) -> MediaError:
        return cls(f"{path}: {reason}")


# -- which frames ------------------------------------------------------------------------------------------------------


def restrict(limits: Limits, start: float | None, end: float | None) -> Limits:
    """Restrict a stream's limits to a segment. If `start` or `end` is None, keep the stream's limit."""
    return (
        limits[0] if start is None else max(limits[0], start),
        limits[1] if end is None else min(limits[1], end),
    )


def frame_count(duration: float, video_fps: float) -> int:
    """Count a clip's whole frames. Allow for float rounding: 0.29 s at 100 frames per second are 29 frames."""
    return int(duration * video_fps + 1e-6)


def select_frames(
    start: float, duration: float, video_fps: float, source_fps: float, end: float, origin: float = 0.0
) -> tuple[npt.NDArray[np.int64], float]:
    """Choose source frames for a clip at another rate. Return their indices [T] and the first frame's time.

    Take the source frame on screen at each of the times `start`, `start + 1/video_fps`, ...; a frame may repeat. There
    are at most `frame_count` times, all before the stream's end and half a source frame before the clip's end. `end` is
    the last second of the stream, and `origin` the time of frame 0.

    Source: docs/papers/avid_cma.md [2.1].
    """
    count = frame_count(duration, video_fps)
    times = start + np.arange(count) / video_fps
    # Rounding may put a time just before its frame.
    slack = 1e-6
    times = times[times < min(start + duration - 0.5 / source_fps, end - slack / source_fps)]
    indices = np.floor((times - origin) * source_fps + slack).astype(np.int64)
    actual = origin + int(indices[0]) / source_fps if len(indices) else start
    return indices, actual


def _on_screen(timed: Iterable[tuple[float, Item]], boundaries: list[float], step: float) -> list[Item]:
    """Choose a frame for each boundary b: the first in [b - step, b), or the last before b - step, or the first."""
    chosen: list[Item] = []
    previous: Item | None = None
    for time, frame in timed:
        while len(chosen) < len(boundaries) and boundaries[len(chosen)] <= time:
            chosen.append(frame if previous is None else previous)
        while len(chosen) < len(boundaries) and boundaries[len(chosen)] - step <= time:
            chosen.append(frame)
        if len(chosen) == len(boundaries):
            break
        previous = frame
    return chosen


def _stacked(frames: Sequence[Pixels], path: Path) -> Tensor:
    if len(shapes := {frame.shape for frame in frames}) > 1:
        sizes = ", ".join(f"{width} x {height}" for height, width, _ in sorted(shapes))
        raise MediaError.of(path, f"has frames of several sizes: {sizes}")
    return torch.from_numpy(np.concatenate(frames).reshape(-1, *frames[0].shape))


# -- cache -------------------------------------------------------------------------------------------------------------


class FileCache:
    """Caches decoded files in this process. When full, drops the files that were not used for longest."""

    _shared: ClassVar[FileCache | None] = None

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.dropped = 0
        # Keys are path, modification time and size.
        self._entries: OrderedDict[tuple[str, int, int], Any] = OrderedDict()

    @classmethod
    def shared(cls, max_bytes: int) -> FileCache | None:
        """Return the process's shared cache, or None if `max_bytes` is 0. The largest limit requested applies."""
        if not max_bytes:
            return None
        if cls._shared is None:
            cls._shared = cls(max_bytes)
        cls._shared.max_bytes = max(cls._shared.max_bytes, max_bytes)
        return cls._shared

    def __reduce__(self) -> tuple[Any, ...]:
        # A cache that is unpickled in another process starts empty.
        return (FileCache.shared if self is FileCache._shared else FileCache, (self.max_bytes,))

    def get(self, path: Path, decode: Callable[[], Content]) -> Content:
        """Return a file's content from the cache, or decode the file and cache the content."""
        with parsing(path, MediaError):
            status = path.stat()
        key = (os.fspath(path), status.st_mtime_ns, status.st_size)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        content = decode()
        if (size := bytes_of(content)) <= self.max_bytes:
            self._entries[key] = content
            self.nbytes += size
        while self.nbytes > self.max_bytes:
            _, old = self._entries.popitem(last=False)
            self.nbytes -= bytes_of(old)
            self.dropped += 1
        return content

    def fill(self, items: Iterable[Item], read: Callable[[Item], object]) -> None:
        """Read items until the cache is full, and ignore items that cannot be read."""
        before = self.dropped
        for item in items:
            with contextlib.suppress(MediaError):
                read(item)
            if self.dropped > before:
                return


def bytes_of(content: object) -> int:
    """Count the bytes of a picture, decoded file, tensor or array. Return 0 for other objects."""
    # Pillow stores RGB in four bytes.
    return 4 * content.width * content.height if isinstance(content, Image.Image) else getattr(content, "nbytes", 0)


# -- pictures ----------------------------------------------------------------------------------------------------------


def read_image(path: Path, cache: FileCache | None = None) -> Image.Image:
    """Decode the first frame to 8-bit RGB without alpha. Ignore EXIF orientation: boxes refer to stored pixels.

    Callers share a cached picture: copy it before you change it.
    """
    if cache is not None:
        return cache.get(path, lambda: read_image(path))
    with parsing(path, MediaError), open_regular(path) as file:
        try:
            with Image.open(file, formats=PICTURES) as image:
                pixels = _to_rgb(image)
        except UnidentifiedImageError:
            raise ValueError(f"damaged, or not one of {', '.join(PICTURES)}") from None
    pixels.info = {}  # EXIF data and color profiles can be larger than the picture
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits and no known range; store it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns if such a palette is converted to RGB in one step.
        image = image.convert("RGBA")
    return image.convert("RGB")


# -- video and sound ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """Contents of a file's headers. `frame_size` is height, width in pixels. A missing stream gives None, 0, (0, 0)."""

    video_limits: Limits | None
    audio_limits: Limits | None
    video_fps: float
    frame_size: tuple[int, int]
    audio_rate: int
    seekable_audio: bool

    @property
    def decoded_bytes(self) -> float:
        height, width = self.frame_size
        video, audio = self.video_limits or (0.0, 0.0), self.audio_limits or (0.0, 0.0)
        return (video[1] - video[0]) * self.video_fps * height * width * 3 + (audio[1] - audio[0]) * self.audio_rate * 8


@dataclass(slots=True)
class AudioTrack:
    """Decoded sound [N, channels] at the file's rate, in the decoder's sample type. `start` is in seconds.

    `sample_format` ("s16", "flt", ...) and `layout` are PyAV's names. `mono` is the whole track in 16 bits, computed
    when a window at the file's rate is first read.
    """

    samples: npt.NDArray[Any]
    rate: int
    start: float
    sample_format: str
    layout: str
    path: Path
    mono: npt.NDArray[np.int16] | None = None

    def read(self, start: float, duration: float, sample_rate: int) -> Tensor:
        wanted = round(duration * sample_rate)
        # Round both on the file's clock: the same sample is chosen wherever the track begins.
        first = max(round(start * self.rate) - round(self.start * self.rate), 0)
        # Start `lead` source samples early, as close as possible to `skip` output samples.
        skip = min(-(-RESAMPLER_MARGIN * sample_rate // self.rate), first * sample_rate // self.rate)
        lead = round(skip * self.rate / sample_rate)
        length = -(-wanted * self.rate // sample_rate) + RESAMPLER_MARGIN
        source = self.samples[max(first - lead, 0) : first + length]
        if source.dtype.kind == "f" and not np.isfinite(source).all():
            raise MediaError.of(self.path, "its sound has values that are not finite")
        if sample_rate == self.rate:
            # Without resampling, a sample doesn't depend on its neighbors, so convert the whole track only once.
            self.mono = self._resampled(self.samples, sample_rate) if self.mono is None else self.mono
            window = self.mono[first : first + wanted]
        else:
            window = self._resampled(source, sample_rate)[skip : skip + wanted] if len(source) else source
        if not len(window):
            raise MediaError.of(self.path, f"no sound could be decoded at {start:.3f} s")
        return torch.from_numpy(window.astype(np.float32)).div_(32767.0)

    def _resampled(self, samples: npt.NDArray[Any], sample_rate: int) -> npt.NDArray[np.int16]:
        with parsing(self.path, MediaError):
            frame = AudioFrame.from_ndarray(samples.reshape(1, -1), format=self.sample_format, layout=self.layout)
            frame.sample_rate = self.rate
            # A graph of PyAV's resampler would start a thread per core.
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
    """A file decoded to frames [H, W, 3] with times, and sound. A file too large for the cache has only headers."""

    info: MediaInfo
    video: list[tuple[float, Pixels]] | None = None
    audio: AudioTrack | None = None

    @property
    def nbytes(self) -> int:
        # Count `mono` even before it is made.
        audio = 0 if self.audio is None else self.audio.samples.nbytes + 2 * len(self.audio.samples)
        return audio + sum(pixels.nbytes for _, pixels in self.video or ())


class MediaFile:
    """A media file to read clips from. Times are in seconds, as in the file's time stamps. Pictures are not rotated."""

    def __init__(self, path: Path, cache: FileCache | None = None) -> None:
        self.path = path
        self._container: InputContainer | None = None
        self._opened = contextlib.ExitStack()
        self._reformatter = VideoReformatter()
        try:
            if cache is None:
                self._decoded = DecodedMedia(self._read_info())
            else:
                self._decoded = cache.get(self.path, lambda: self._decode(cache.max_bytes))
        except BaseException:
            self.close()
            raise
        self.info = self._decoded.info
        self.video_limits = self.info.video_limits
        self.audio_limits = self.info.audio_limits
        self.video_fps = self.info.video_fps

    def read_video(self, start: float, duration: float, fps: float, last: float = math.inf) -> tuple[Tensor, float]:
        """Decode a clip at a given frame rate. Frames are repeated or dropped, never blended.

        Returns frames [T, H, W, 3] uint8 and the first frame's time. T is `duration * fps`, or less if the clip is cut
        short by the file's end or by the time `last`.

        Source: docs/papers/avid_cma.md [2.1].
        """
        if self.video_limits is None:
            raise MediaError.of(self.path, "has no video stream")
        origin, end = self.video_limits
        end = min(end, last)
        indices, actual_start = select_frames(start, duration, fps, self.video_fps, end, origin)
        if not len(indices):
            raise MediaError.of(self.path, f"no frame between {start:.3f} and {min(start + duration, end):.3f} s")
        step = 1.0 / self.video_fps
        # Switch frames halfway between grid times, so that rounded time stamps don't select a neighboring frame.
        boundaries = (origin + (indices + np.float64(0.5)) * step).tolist()
        if (timed := self._decoded.video) is not None:
            first = next((place for place, (time, _) in enumerate(timed) if time >= boundaries[0] - step), len(timed))
            frames = _on_screen(timed[max(first - 1, 0) :], boundaries, step)
        else:
            with parsing(self.path, MediaError):
                shown = _on_screen(self._frames_before(boundaries[0], step), boundaries, step)
                pixels = {frame: self._pixels(frame) for frame in set(shown)}
            frames = [pixels[frame] for frame in shown]
        if not frames:
            raise MediaError.of(self.path, f"no video frame could be decoded at {start:.3f} s")
        return _stacked(frames, self.path), actual_start

    def read_audio(self, start: float, duration: float, sample_rate: int) -> Tensor:
        """Decode a window of sound as mono, float32 [N] in [-1, 1], resampled. N is smaller at the file's end.

        Source: docs/papers/avid_cma.md [2.3], step 1.
        """
        if self.audio_limits is not None:
            start = max(start, self.audio_limits[0])
        return self.decode_audio(start, duration).read(start, duration, sample_rate)

    def decode_audio(self, start: float, duration: float) -> AudioTrack:
        """Decode a window of sound and a small margin at the file's rate, for callers that cut many shorter windows."""
        if self.audio_limits is None:
            raise MediaError.of(self.path, "has no audio stream")
        if self._decoded.audio is not None:
            return self._decoded.audio
        margin = 2 * RESAMPLER_MARGIN / self.info.audio_rate
        return self._read_track(start - margin, start + duration + margin)

    def close(self) -> None:
        # Drop the streams: once the container is closed, they point to freed memory.
        self._streams: dict[str, Any] = {}
        self._container = None
        self._opened.close()

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode(self, max_bytes: int) -> DecodedMedia:
        """Decode the whole file. If it would take more than `max_bytes`, decode only the headers."""
        self.info = self._read_info()
        media = DecodedMedia(self.info)
        if self.info.decoded_bytes > max_bytes:
            return media
        if self.info.video_limits is not None:
            with parsing(self.path, MediaError):
                media.video = [(time, self._pixels(frame)) for time, frame in self._frames("video", None)]
            if not media.video:
                raise MediaError.of(self.path, "no video frame could be decoded")
        if self.info.audio_limits is not None:
            media.audio = self._read_track(-np.inf, np.inf)
        self.close()
        return media

    # Opening

    def _open(self) -> InputContainer:
        self.close()
        # Pass an open file: FFmpeg takes a name such as `http:` for an address.
        file = self._opened.enter_context(open_regular(self.path))
        limits = {"protocol_whitelist": "none", "format_whitelist": CONTAINERS}
        # Tags in old files may be invalid text, but they are not read.
        try:
            container = self._container = av.open(file, mode="r", options=limits, metadata_errors="ignore")
        except av.ArgumentError as error:
            raise MediaError.of(self.path, f"damaged, or not one of {CONTAINERS}") from error
        self._opened.enter_context(container)
        self._fresh = True
        films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        for kind, streams in (("video", films), ("audio", container.streams.audio)):
            for stream in streams[:1]:
                context: Any = stream.codec_context
                if context is None:
                    raise MediaError.of(self.path, "the codec of a stream is not known")
                # Loader processes already use all cores.
                context.thread_count = 1
                self._streams[kind] = stream
        return container

    def _read_info(self) -> MediaInfo:
        with parsing(self.path, MediaError):
            container = self._open()
            video, audio = self._streams.get("video"), self._streams.get("audio")
            if video is None and audio is None:
                raise MediaError.of(self.path, "has neither a video nor an audio stream")
            fps, size, rate = 0.0, (0, 0), 0
            if video is not None:
                fps = float(video.average_rate or video.guessed_rate or video.base_rate or 0)
                size = (video.codec_context.height, video.codec_context.width)
                if fps <= 0 or not all(size):
                    raise MediaError.of(self.path, "the video stream has no frame rate or no size")
            if audio is not None:
                rate = audio.codec_context.sample_rate
                if not rate:
                    raise MediaError.of(self.path, "the audio stream has no sample rate")
            limits = {kind: self._limits(stream, container) for kind, stream in self._streams.items()}
        for start, end in limits.values():
            if not end - start < LONGEST_SECONDS:
                raise MediaError.of(self.path, f"claims to last {end - start:.0f} s; its header is damaged")
        # FFmpeg gives the packets of an Ogg file's last page wrong time stamps after a seek.
        seekable = container.format.name != "ogg"
        return MediaInfo(limits.get("video"), limits.get("audio"), fps, size, rate, seekable)

    def _limits(self, stream: VideoStream | AudioStream, container: InputContainer) -> Limits:
        base = stream.time_base
        assert base is not None
        if stream.duration:
            start = float((stream.start_time or 0) * base)
            return start, start + float(stream.duration * base)
        start = float(stream.start_time * base) if stream.start_time is not None else 0.0
        if container.duration:
            # Matroska and others store the whole file's duration. Most writers store a stream's duration in a tag.
            end = ((container.start_time or 0) + container.duration) / av.time_base
            tag = _CLOCK.fullmatch(stream.metadata.get("DURATION", ""))
            stream_end = 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3]) if tag else end
            return start, min(stream_end, end) if stream_end > start else end
        return start, max(start, self._ends.get(stream.index, start))

    @cached_property
    def _ends(self) -> dict[int, float]:
        """Read all packets to find each stream's last second. Broken recordings lack it in the header."""
        assert self._container is not None
        self._fresh = False
        ends: dict[int, float] = {}
        for packet in self._container.demux(list(self._streams.values())):
            if packet.pts is not None and packet.time_base is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream.index] = max(end, ends.get(packet.stream.index, end))
        return ends

    # Decoding

    def _frames(self, kind: Literal["video", "audio"], seek_to: float | None) -> Iterator[tuple[float, Any]]:
        """Yield times and frames of a stream, from the last key frame before `seek_to`, or from the start if None."""
        container = self._container
        if container is None or (seek_to is None and not self._fresh):
            # Reopen it, because not every container can seek to its beginning.
            container = self._open()
        self._fresh = False
        stream = self._streams[kind]
        for other in container.streams:
            other.discard = Discard.default if other is stream else Discard.all
        limits = self.info.video_limits if kind == "video" else self.info.audio_limits
        assert limits is not None
        # A frame without a time stamp follows the previous one. After a seek, the first frame's time is unknown.
        following = limits[0] if seek_to is None else np.inf
        if seek_to is not None:
            container.seek(int(seek_to / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            time = following if frame.time is None else frame.time
            following = time + (1.0 / self.info.video_fps if kind == "video" else frame.samples / frame.sample_rate)
            yield time, frame

    def _frames_before(self, boundary: float, step: float) -> Iterable[tuple[float, VideoFrame]]:
        """Yield times and frames, starting with one before `boundary` if there is one."""
        assert self.info.video_limits is not None
        first = boundary - 0.5 * step
        if first - self.info.video_limits[0] > step:
            frames = self._frames("video", first)
            first_frame = next(frames, None)
            # A seek may go too far, or to a part that can't be decoded (such as MPEG's last group of pictures).
            if first_frame is not None and first_frame[0] < boundary:
                return chain([first_frame], frames)
        return self._frames("video", None)

    def _pixels(self, frame: VideoFrame) -> Pixels:
        # PyAV's default would start a thread per core in every loader process.
        pixels: Any = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return pixels

    def _read_track(self, start: float, end: float) -> AudioTrack:
        assert self.info.audio_limits is not None
        seek_to = start - AUDIO_PREROLL_SECONDS
        with parsing(self.path, MediaError):
            track = None
            if self.info.audio_limits[0] + AUDIO_PREROLL_SECONDS < seek_to and self.info.seekable_audio:
                track = self._collect_audio(start, end, seek_to)
            if track is None:
                track = self._collect_audio(start, end, None)
        if track is None:
            raise MediaError.of(self.path, f"no sound could be decoded at {max(start, 0.0):.3f} s")
        return track

    def _collect_audio(self, start: float, end: float, seek_to: float | None) -> AudioTrack | None:
        """Decode the sound of a window, extended to whole frames. Return None if the seek passed `start`."""
        assert self.info.audio_limits is not None
        parts: list[npt.NDArray[Any]] = []
        anchor, collected, rate = 0.0, 0, 0
        frame: AudioFrame | None = None
        for time, frame in self._frames("audio", seek_to):
            rate = rate or frame.sample_rate
            if frame.sample_rate != rate:
                raise MediaError.of(self.path, f"the sample rate changes from {rate} to {frame.sample_rate}")
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
                    break  # A time stamp past the stream's end: ignore the rest.
                parts.append(np.zeros((gap, samples.shape[1]), samples.dtype))
                collected += gap
            elif -gap > AUDIO_GAP_SECONDS * rate:
                samples = samples[-gap:]
            parts.append(samples)
            collected += len(samples)
            if following >= end:
                break
        if frame is None or not parts:
            return None
        channels = parts[0].shape[1]
        layout = {1: "mono", 2: "stereo"}.get(channels, frame.layout.name)
        return AudioTrack(np.concatenate(parts), rate, anchor, frame.format.packed.name, layout, self.path)


def _samples(frame: AudioFrame) -> npt.NDArray[Any]:
    """Return a frame's samples [N, channels]. `to_ndarray` crashes for 7.1, where PyAV lists a ninth plane."""
    channels, count = frame.layout.nb_channels, frame.samples
    dtype = _SAMPLE_TYPES[frame.format.packed.name]
    if not frame.format.is_planar:
        return np.frombuffer(memoryview(frame.planes[0]), dtype, count * channels).reshape(-1, channels).copy()
    return np.stack([np.frombuffer(memoryview(plane), dtype, count) for plane in frame.planes[:channels]], axis=1)


# -- folders of frames -------------------------------------------------------------------------------------------------


class FrameFolder:
    """A clip stored as numbered pictures, read like a `MediaFile`. The previous picture replaces a missing one."""

    audio_limits = None
    #: TVQA's frames per second.
    video_fps = 3.0

    def __init__(self, path: Path, cache: FileCache | None = None) -> None:
        self.path = path
        self._cache = cache
        with parsing(self.path, MediaError):
            names = sorted(os.listdir(self.path))
        # Skip hidden files, which some systems create when they copy pictures.
        matches = [_NUMBERED.fullmatch(name) for name in names if not name.startswith(".")]
        numbered = {int(match[1]): match[0] for match in matches if match}
        if not numbered:
            raise MediaError.of(self.path, "holds no numbered frame (00001.jpg, 00002.jpg, ...)")
        self._numbers = np.array(sorted(numbered))
        self._names = [numbered[number] for number in self._numbers.tolist()]
        self.video_limits: Limits = (0.0, int(self._numbers[-1]) / self.video_fps)

    def read_video(self, start: float, duration: float, fps: float) -> tuple[Tensor, float]:
        """See `MediaFile.read_video`."""
        end = self.video_limits[1]
        indices, actual_start = select_frames(start, duration, fps, self.video_fps, end)
        if not len(indices):
            raise MediaError.of(self.path, f"no frame between {start:.3f} and {min(start + duration, end):.3f} s")
        held = np.searchsorted(self._numbers, indices + 1, side="right") - 1
        rows, places = np.unique(np.maximum(held, 0), return_inverse=True)
        frames = [self._frame(row) for row in rows.tolist()]
        return _stacked([frames[place] for place in places.tolist()], self.path), actual_start

    def read_audio(self, start: float, duration: float, sample_rate: int) -> Tensor:
        raise MediaError.of(self.path, "has no audio stream")

    def fill_cache(self) -> None:
        for row in range(len(self._names)):
            self._frame(row)

    def _frame(self, row: int) -> Pixels:
        return np.asarray(read_image(self.path / self._names[row], self._cache))


@contextlib.contextmanager
def open_media(path: Path, cache: FileCache | None = None) -> Iterator[MediaFile | FrameFolder]:
    if path.is_dir():
        yield FrameFolder(path, cache)
    else:
        with MediaFile(path, cache) as media:
            yield media
