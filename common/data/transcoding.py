"""Videos written anew so that short clips are quick to read: small pictures, and one to start from every few of them.

A clip that begins anywhere in a film costs the decoding of all pictures since the last one that stands alone (a key
frame), in files from the web often ten seconds, at full size. Sound is copied as it is.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import av

from common.data.datasets.base import walk
from common.data.media import MediaError, MediaInfo, probe, video_stream
from common.files import usable_cores, write_atomically, write_whole

#: Pictures from one that stands alone to the next, at most.
GROUP = 32
#: Pixels of the shorter side, at most; smaller pictures keep their size.
SHORT_SIDE = 288
#: What is read as a video, and what lies beside it and is copied: lists, not sounds and not archives.
VIDEOS = frozenset({".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".flv"})
LISTS = frozenset({".csv", ".txt", ".json", ".jsonl"})
#: File in the new folder that names what could not be written.
FAILED = "not_transcoded.txt"
#: Sound that the new container takes as it is; other is encoded as AAC.
_TAKEN = frozenset({"aac", "mp3", "mp3float"})
#: Seconds by which a stream may end sooner or later than before.
_TOLERANCE = 0.3


@dataclass
class Transcoded:
    """What was done: files written now, there from before, lists copied, and why others failed, by name."""

    written: int = 0
    kept: int = 0
    lists: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def transcode_folder(
    source: Path,
    target: Path,
    workers: int | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Transcoded:
    """Write every video below a folder anew, under the same name with `.mp4`, in parallel.

    A file appears when it is whole and has been checked, so a call that was stopped goes on where it was.

    Args:
        source: folder of a data set.
        target: folder to write.
        workers: files at a time; None for one on each CPU.
        advance: called after every video.

    Raises:
        ValueError: the folders are one, or two videos would become one file.
    """
    if source == target:
        raise ValueError(f"cannot write the videos of {source} anew into the same folder")
    videos = videos_of(source)
    first: dict[Path, Path] = {}
    for path in videos:
        other = first.setdefault(path.with_suffix(".mp4"), path)
        if other != path:
            raise ValueError(f"{other} and {path} would both become {path.stem}.mp4: rename or remove one of them")
    done = Transcoded()

    def write(path: Path) -> tuple[Path, str]:
        output = (target / path.relative_to(source)).with_suffix(".mp4")
        if output.is_file() and output.stat().st_mtime >= path.stat().st_mtime:
            return path, "kept"
        try:
            transcode(path, output)
        except (MediaError, OSError, ValueError, av.FFmpegError) as error:
            return path, str(error) or type(error).__name__
        return path, ""

    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        try:
            for path, outcome in pool.map(write, videos):
                if outcome == "kept":
                    done.kept += 1
                elif outcome:
                    done.failed[path.relative_to(source).as_posix()] = " ".join(outcome.split())
                else:
                    done.written += 1
                advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for path in _files(source, LISTS):
        output = target / path.relative_to(source)
        if not output.is_file() or not filecmp.cmp(path, output, shallow=False):
            write_whole(output, partial(shutil.copyfile, path))
        done.lists += 1
    if done.failed:
        lines = "".join(f"{name}\t{reason}\n" for name, reason in sorted(done.failed.items()))
        write_atomically(target / FAILED, lines.encode("utf-8", "surrogateescape"))
    else:
        (target / FAILED).unlink(missing_ok=True)
    return done


def videos_of(folder: Path) -> list[Path]:
    """The videos below a folder, sorted."""
    return list(_files(folder, VIDEOS))


def _files(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    for name, _ in sorted(walk(folder, suffixes, [])):  # also below links to folders, as data sets are listed
        if (folder / name).is_file():
            yield folder / name


def transcode(source: Path, output: Path, short_side: int = SHORT_SIDE) -> None:
    """Write one video anew and check it, before it takes its place.

    Args:
        source: any file that PyAV reads.
        output: the new file, `.mp4`.
        short_side: pixels of the shorter side, at most.

    Raises:
        MediaError: the file cannot be read, or the new one is not what it should be.
        av.FFmpegError: it cannot be decoded.
    """
    before = probe(source)
    if before.video_limits is None:
        raise MediaError.of(source, "has no video stream")

    def write(path: Path) -> None:
        _encode(source, path, short_side)
        _check(source, before, path)

    write_whole(output, write)


def _encode(source: Path, output: Path, short_side: int) -> None:
    with av.open(str(source)) as read, av.open(str(output), "w") as written:
        pictures = video_stream(read)
        assert pictures is not None
        pictures.codec_context.thread_count = 1
        video: Any = written.add_stream("libx264", rate=pictures.average_rate or 25)
        video.width, video.height = _size(pictures.codec_context.width, pictures.codec_context.height, short_side)
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        video.codec_context.time_base = pictures.time_base
        video.codec_context.gop_size = GROUP
        # Pictures that lean on later ones would make a reader decode further.
        video.options = {"crf": "20", "preset": "fast", "bf": "0", "keyint_min": str(GROUP), "sc_threshold": "0"}
        sound = read.streams.audio[0] if read.streams.audio else None
        as_it_is = sound is not None and sound.codec_context.name in _TAKEN
        if sound is None:
            heard: Any = None
        elif as_it_is:
            heard = written.add_stream_from_template(sound)
        else:
            layout = "mono" if sound.codec_context.channels == 1 else "stereo"
            heard = written.add_stream("aac", rate=sound.codec_context.sample_rate, layout=layout)
        streams = [pictures] if sound is None else [pictures, sound]
        last = None
        for packet in read.demux(streams):
            if packet.stream is pictures:
                frame: Any
                for frame in packet.decode():
                    # Damaged files repeat times, which no encoder takes.
                    if frame.pts is None or (last is not None and frame.pts <= last):
                        continue
                    last = frame.pts
                    scaled = frame.reformat(video.width, video.height, "yuv420p", interpolation="BICUBIC")
                    scaled.pict_type = 0
                    written.mux(video.encode(scaled))
            elif packet.dts is not None and as_it_is:
                packet.stream = heard
                written.mux(packet)
            elif packet.dts is not None:
                for samples in packet.decode():
                    written.mux(heard.encode(samples))
        written.mux(video.encode())
        if heard is not None and not as_it_is:
            written.mux(heard.encode())


def _size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Even numbers, the shorter one no more than wanted."""
    share = min(1.0, short_side / min(width, height))
    # Rounded down; a product may lie a hair below the whole number that it is.
    return max(2, 2 * int(width * share / 2 + 1e-6)), max(2, 2 * int(height * share / 2 + 1e-6))


def _check(source: Path, before: MediaInfo, path: Path) -> None:
    after = probe(path)
    for what, old, new in (
        ("picture", before.video_limits, after.video_limits),
        ("sound", before.audio_limits, after.audio_limits),
    ):
        lasted, lasts = (0.0 if limits is None else limits[1] - limits[0] for limits in (old, new))
        if (old is None) != (new is None) or abs(lasted - lasts) > _TOLERANCE:
            raise MediaError.of(source, f"{what} lasts {lasts:.2f} s when written anew and {lasted:.2f} s before")
    if (longest := longest_group(path)) > GROUP:
        raise MediaError.of(source, f"written anew, a key frame comes after {longest} pictures and not after {GROUP}")


def longest_group(path: Path) -> int:
    """Pictures from a key frame to the next, at most; nothing is decoded."""
    longest = current = 0
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            if packet.dts is None:
                continue
            current = 1 if packet.is_keyframe else current + 1
            longest = max(longest, current)
    return longest
