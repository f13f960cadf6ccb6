"""Test decoding by time stamp: several containers, with and without the cache, and damaged files."""

from __future__ import annotations

import io
import json
import os
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.audio.frame import AudioFrame
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.data.clips import clip_start
from common.data.media import (
    FileCache,
    FrameFolder,
    MediaError,
    MediaFile,
    MediaInfo,
    _on_screen,
    frame_count,
    select_frames,
)
from common.data.worlds.audiovisual import write_clip
from tests.data.media_factory import frame_numbers, numbered_frames, tone, write_audio, write_video
from tests.data.text_layouts import write_frames

TIMING = json.loads((Path(__file__).parents[1] / "golden/avid_cma/timing.json").read_text())
RATE = st.floats(1.0, 60.0)
CONTAINERS = [(".mp4", 0), (".mp4", 2), (".mkv", 2), (".avi", 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@given(st.lists(st.integers(0, 40), min_size=1), st.lists(st.integers(0, 40)), st.integers(1, 6))
def test_a_frame_is_on_screen_until_the_next(times: list[int], boundaries: list[int], step: int) -> None:
    expected = []
    for boundary in sorted(boundaries):
        before = sorted(time for time in times if time < boundary)
        shown = [time for time in before if time >= boundary - step] or before[-1:] or [min(times)]
        if max(times) >= boundary - step:
            expected.append(shown[0])
    assert _on_screen([(time, time) for time in sorted(times)], sorted(boundaries), step) == expected


def test_worlds_write_clips_at_their_rate(folder: Path) -> None:
    write_clip(folder / "world.mp4", np.zeros((10, 16, 32, 3), np.uint8), 8)
    assert MediaFile(folder / "world.mp4").info == MediaInfo((0, 1.25), None, 8, (16, 32), 0, True)


def test_what_decoding_takes_is_known_before() -> None:
    assert MediaInfo((0.5, 2.5), (0.25, 1.5), 8, (16, 32), 100, True).decoded_bytes == 16 * 16 * 32 * 3 + 125 * 8
    assert MediaInfo(None, None, 8, (16, 32), 100, True).decoded_bytes == 0


@pytest.mark.parametrize(
    ("stream", "file", "tag", "expected"),
    [
        ((500, 2000), (0, 0), "", (0.5, 2.5)),
        ((500, None), (250, 4000), "", (0.5, 4.25)),
        ((None, None), (None, 4000), "soon", (0.0, 4.0)),
        ((500, None), (0, 5_000_000), "01:02:03.500000000", (0.5, 3723.5)),
        ((500, None), (0, 3000), "00:00:04.000000000", (0.5, 3.0)),
        ((500, None), (0, 3000), "00:00:00.500000000", (0.5, 3.0)),
        ((500, None), (None, None), "", (0.5, 7.0)),
        ((8000, None), (None, None), "", (8.0, 8.0)),
    ],
)
def test_a_header_says_where_a_stream_begins_and_ends(stream: Any, file: Any, tag: str, expected: Any) -> None:
    """Use the limits of the stream, the file or the tag (in ms), or else the end of the last packet (7 s)."""
    own = SimpleNamespace(
        time_base=Fraction(1, 1000), start_time=stream[0], duration=stream[1], index=3, metadata={"DURATION": tag}
    )
    whole = SimpleNamespace(start_time=file[0] and 1000 * file[0], duration=file[1] and 1000 * file[1])
    assert MediaFile._limits(SimpleNamespace(_ends={3: 7.0}), own, whole) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("suffix", "b_frames", "fps"),
    # Matroska rounds time stamps to milliseconds.
    [*((*kind, 25.0) for kind in CONTAINERS), (".mkv", 0, 30000 / 1001), (".mkv", 0, 23.976), (".mkv", 0, 15.0)],
)
def test_frames_are_those_of_the_wanted_times(folder: Path, suffix: str, b_frames: int, fps: float) -> None:
    path = write_video(folder / f"frames{b_frames}{fps:.2f}{suffix}", seconds=3.0, fps=fps, b_frames=b_frames)
    with MediaFile(path) as media:
        assert media.video_limits == pytest.approx((0.0, round(3.0 * fps) / fps), abs=0.05)
        assert media.video_fps == pytest.approx(fps, rel=1e-4)
        for start in (0.0, 0.3, 1.0, 1.31, 2.1):
            frames, actual = media.read_video(start, 0.5, 16.0)
            expected = np.floor((start + np.arange(8) / 16) * media.video_fps + 1e-6).astype(int)
            assert frame_numbers(frames.numpy()) == expected.tolist()
            assert frames.dtype == torch.uint8
            assert actual == pytest.approx(expected[0] / media.video_fps)


@pytest.mark.parametrize("every", [20, 60])
def test_frames_of_the_last_group_of_pictures_of_a_stream(folder: Path, every: int) -> None:
    """Read an MPEG stream from its start if a seek past its last key frame finds nothing that can be decoded."""
    path = write_video(folder / f"groups{every}.ts", seconds=6.0, fps=10.0, key_frame_every=every)
    with MediaFile(path) as media:
        begin, _ = media.video_limits or (0.0, 0.0)
        for start in (0.5, 2.5, 4.6, 5.3):
            frames, _ = media.read_video(begin + start, 0.5, 10.0)
            assert frame_numbers(frames.numpy()) == pytest.approx([round(start * 10) + k for k in range(5)], abs=1)


def test_a_recording_that_was_never_finished_has_its_sound(folder: Path) -> None:
    whole = write_video(folder / "whole.mkv", seconds=3.0, fps=8.0)
    live = folder / "live.mkv"
    with av.open(str(whole)) as source, av.open(str(live), "w", options={"live": "1"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        target.add_stream_from_template(source.streams[1])  # ignored, because it is empty
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    assert av.open(str(live)).duration is None
    info = MediaFile(live).info
    assert info.video_limits == info.audio_limits == pytest.approx((0.0, 3.0))
    with MediaFile(live) as media:
        assert frame_numbers(media.read_video(0.0, 0.5, 8.0)[0].numpy()) == [0, 1, 2, 3]
        assert len(media.read_audio(1.0, 0.5, 16_000)) == 8_000


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".wav", ".flac"])
def test_lossless_sound_is_cut_to_the_sample(folder: Path, suffix: str) -> None:
    samples = tone(2.0, 16_000)
    write = write_video if suffix in (".mkv", ".avi") else write_audio
    path = write(folder / f"sound{suffix}", audio=samples)
    with MediaFile(path) as media:
        assert media.audio_limits == pytest.approx((0.0, 2.0), abs=0.05)
        for start in (0.0, 0.4, 1.25, 1.9):
            first = round(start * 16_000)
            expected = samples[0, first : first + 3200]
            window = media.read_audio(start, 0.2, 16_000)
            assert window.dtype == torch.float32
            assert len(window) == len(expected)
            # Allow an error of one 16-bit step, because full scale may be 32767 or 32768.
            assert np.abs(window.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("suffix", "channels"), [(".mp4", 2), (".avi", 2), (".mkv", 2), (".flac", 2), (".wav", 6), (".wav", 8), (".mp4", 8)]
)
def test_sound_and_pixels_are_those_of_pyav(folder: Path, suffix: str, channels: int) -> None:
    """Compare with PyAV's resampler and threads. We avoid both because of their cost, but get the same bits."""
    sound = np.random.default_rng(0).normal(0, 0.1, (channels, 44_100)).astype(np.float32)
    with_video = channels == 2 and suffix != ".flac"
    write = write_video if with_video else write_audio
    path = write(folder / f"pyav{channels}{suffix}", audio=sound, audio_rate=22_050)
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=8_000)
        decoded = [*container.decode(audio=0), None]
        expected = np.concatenate([part.to_ndarray()[0] for given in decoded for part in resampler.resample(given)])
    with MediaFile(path) as media:
        track = media.decode_audio(0.0, 2.0)
        # Start at the file's first sample, so that both resamplers get the same input.
        start = max(track.start, 0.0)
        found = media.read_audio(start, 1.0, 8_000).numpy()
    first = round((start - track.start) * 8_000)
    assert np.array_equal(found, expected[first : first + 8_000].astype(np.float32) / 32767)
    if with_video:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        whole = MediaFile(path, FileCache(2**30))._decoded.video or []
        assert np.array_equal([pixels for _, pixels in whole], frames)


@pytest.mark.parametrize(("suffix", "b_frames"), CONTAINERS)
def test_the_cache_gives_the_same_results(folder: Path, suffix: str, b_frames: int) -> None:
    path = write_video(folder / f"cached{b_frames}{suffix}", seconds=1.5, fps=8.0, size=(24, 24), audio_rate=8_000)
    with MediaFile(path) as direct, MediaFile(path, FileCache(2**22)) as cached:
        assert direct.info == cached.info
        for start in np.linspace(0.0, 1.45, 30):
            for fps in (5.0, 8.0, 11.0):
                expected, expected_start = direct.read_video(start, 0.5, fps)
                frames, actual_start = cached.read_video(start, 0.5, fps)
                assert torch.equal(frames, expected)
                frames.zero_()  # must not change the cache
                assert actual_start == expected_start
            for rate in (8_000, 6_000, 11_025):
                assert torch.equal(cached.read_audio(start, 0.5, rate), direct.read_audio(start, 0.5, rate))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_the_cache_gives_the_same_sound_far_into_a_file(folder: Path, suffix: str) -> None:
    path = write_audio(folder / f"long{suffix}", tone(6.0, 22_050, channels=2), 22_050)
    with MediaFile(path) as direct, MediaFile(path, FileCache(2**24)) as cached:
        for start in (0.0, 1.3, 3.71, 5.9):
            sound = direct.read_audio(start, 0.4, 24_000)
            assert torch.equal(cached.read_audio(start, 0.4, 24_000), sound)
            assert torch.equal(direct.read_audio(start, 0.8, 24_000)[: len(sound)], sound)  # the start stays the same


def test_the_cache_is_bounded_and_notices_new_files(folder: Path) -> None:
    path, cache = write_video(folder / "bounded.mkv", seconds=1.0, fps=8.0), FileCache(2**20)
    MediaFile(path, cache)
    assert cache.nbytes == 8 * 32 * 48 * 3 + 16_000 * (2 + 2)  # pixels, and the sound before and after mixing to mono
    with MediaFile(path, FileCache(cache.nbytes // 4)) as media:
        assert media._decoded.video is None
        assert frame_numbers(media.read_video(0.0, 1.0, 8.0)[0].numpy()) == list(range(8))
    write_video(path, frames=numbered_frames(20, (32, 48))[12:], fps=8.0)
    os.utime(path, ns=(1, 1))
    with MediaFile(path, cache) as media:
        assert frame_numbers(media.read_video(0.0, 1.0, 8.0)[0].numpy()) == list(range(12, 20))


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_film_that_breaks_off_fails_where_it_is_missing(folder: Path, suffix: str, cached: bool) -> None:
    whole = write_video(folder / f"long{suffix}", seconds=4.0, codec="mpeg4")
    path = folder / f"broken_off{suffix}"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with MediaFile(path, FileCache(2**24) if cached else None) as media:
        assert frame_numbers(media.read_video(0.2, 0.5, 16.0)[0].numpy())[0] == 5
        with pytest.raises(MediaError, match="broken_off"):
            media.read_video(3.4, 0.5, 16.0)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_cover_is_not_the_video_of_a_sound(folder: Path, damaged: bool) -> None:
    plain = write_audio(folder / "plain.mp3", tone(2.0, 16_000))
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "png")
    picture = stream.getvalue()[:8] if damaged else stream.getvalue()
    body = b"\0image/png\0\x03\0" + picture
    frame = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    covered = folder / f"covered{damaged}.mp3"
    # Each byte of the tag's size holds seven bits.
    covered.write_bytes(b"ID3\x03\0\0" + bytes([0, 0, len(frame) >> 7, len(frame) & 127]) + frame + plain.read_bytes())
    assert len(av.open(str(covered)).streams.video) == 1
    with MediaFile(plain) as expected, MediaFile(covered) as media:
        assert media.info == expected.info
        assert media.video_limits is None
        assert torch.equal(media.read_audio(0.5, 0.5, 16_000), expected.read_audio(0.5, 0.5, 16_000))


def test_a_seek_that_goes_too_far_is_done_again_from_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(folder / "overshoot.mp4", seconds=4.0, key_frame_every=25)
    with MediaFile(path) as media:
        frames_from = media._frames
        monkeypatch.setattr(media, "_frames", lambda kind, seek_to: frames_from(kind, seek_to and seek_to + 1.0))
        frames, _ = media.read_video(1.6, 0.5, 16.0)
    assert frame_numbers(frames.numpy())[0] == 40


@pytest.mark.parametrize(
    ("stamps", "window", "begin", "expected"),
    [
        ((0.0, 0.14), (0.0, 1.0), 0.0, [(1, 100), (2, 100)]),
        ((0.0, 0.3), (0.0, 1.0), 0.0, [(1, 100), (0, 200), (2, 100)]),
        ((0.0, 0.3, 0.4), (0.0, 0.3), 0.0, [(1, 100)]),
        ((0.0, 0.1, 0.5), (0.0, 0.2), 0.0, [(1, 100), (2, 100)]),
        ((0.0, 0.06), (0.0, 1.0), 0.0, [(1, 100), (2, 100)]),
        ((0.0, 0.02), (0.0, 1.0), 0.0, [(1, 100), (2, 20)]),
        ((0.0, 2.5), (0.0, 9.0), 0.0, [(1, 100), (0, 2400), (2, 100)]),
        ((0.0, 3.0), (0.0, 9.0), 0.0, [(1, 100)]),
        ((0.5, 0.6, 0.7), (0.6, 0.65), 0.6, [(2, 100)]),
    ],
)
def test_sound_lies_on_its_stamps(
    folder: Path, stamps: tuple[float, ...], window: Any, begin: float, expected: list[tuple[int, int]]
) -> None:
    """Fill gaps above 50 ms with silence, cut overlaps, and reject a time stamp a second after the stream's end."""
    frames = [AudioFrame.from_ndarray(np.full((1, 100), n, np.int16), "s16", "mono") for n in (1, 2, 3)]
    for frame in frames:
        frame.sample_rate = 1000
    with MediaFile(write_audio(folder / "stamps.wav", tone(2.0, 1000), 1000)) as media:
        media._frames = lambda *_: zip(stamps, frames)  # type: ignore[method-assign,assignment]
        track = media._collect_audio(*window, None)
        assert track is not None
        assert (track.start, [(n, len(list(own))) for n, own in groupby(track.samples[:, 0])]) == (begin, expected)
        assert (media._collect_audio(*window, 0.0) is None) == (stamps[0] > window[0])
        assert media._collect_audio(9.0, 9.5, None) is None
        frames[1].sample_rate = 900
        with pytest.raises(MediaError, match="from 1000 to 900"):
            media._read_track(0.0, 9.0)


# -- which frames ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TIMING["frame_selection"])
def test_frame_choice_equals_the_reference(case: dict) -> None:
    end = case["src_frames"] / case["src_fps"]
    indices, start = select_frames(case["start"], case["duration"], case["video_fps"], case["src_fps"], end)
    assert indices.tolist() == case["frame_indices"]
    assert start == pytest.approx(case["actual_start"], abs=1e-9)


@given(st.floats(-1.0, 5.0), st.floats(0.1, 20.0), st.floats(0.0, 0.999), st.floats(0.1, 3.0), RATE, RATE)
def test_chosen_frames_exist_and_follow_each_other(
    origin: float, seconds: float, draw: float, duration: float, video_fps: float, source_fps: float
) -> None:
    end = origin + seconds
    start = clip_start((origin, end), duration, draw)
    indices, actual = select_frames(start, duration, video_fps, source_fps, end, origin)
    assert len(indices) <= frame_count(duration, video_fps)
    assert np.all(np.diff(indices, prepend=0) >= 0)
    assert all(origin + indices[-1:] / source_fps <= end + 1e-9)
    assert abs(actual - start) <= 1.0 / source_fps + 1e-9


@pytest.mark.parametrize("fps", [3.0, 24000 / 1001, 25.0, 30.0])
@pytest.mark.parametrize("origin", [0.0, 0.4])
def test_a_clip_that_begins_with_a_frame_skips_none(fps: float, origin: float) -> None:
    for first in range(400):
        start, end = origin + first / fps, origin + 400 / fps
        indices, actual = select_frames(start, 8 / fps, fps, fps, end, origin)
        assert indices.tolist() == list(range(first, min(first + 8, 400)))
        assert actual == pytest.approx(start)


# -- folders of frames -------------------------------------------------------------------------------------------------


def levels(frames: torch.Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / 10) for frame in frames]


@pytest.mark.parametrize(
    ("numbers", "window", "expected"),
    [
        (range(1, 13), (0.0, 4.0, 3.0), list(range(1, 13))),
        (range(1, 13), (1.4, 1.0, 3.0), [5, 6, 7]),
        (range(1, 7), (0.0, 2.0, 6.0), [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]),
        (range(1, 7), (0.0, 2.0, 1.5), [1, 3, 5]),
        ([2, 3, 6], (0.0, 2.0, 3.0), [2, 2, 3, 3, 3, 6]),
    ],
)
def test_numbered_frames_lie_on_their_time(
    tmp_path: Path, numbers: list[int], window: tuple[float, float, float], expected: list[int]
) -> None:
    """Read frames at three per second. If a numbered file is missing, the frame before it is repeated."""
    clip = FrameFolder(write_frames(tmp_path / "clip", numbers))
    assert clip.video_limits == (0.0, max(numbers) / 3)
    frames, _ = clip.read_video(*window)
    assert levels(frames) == expected
    assert (frames.dtype, frames.shape[1:]) == (torch.uint8, (8, 10, 3))


def test_other_names_files_and_formats_in_a_folder_of_frames(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", [1, 2], suffix="png")
    (folder / "00002.png").rename(folder / "frame_00002.PNG")
    (folder / "._00003.jpg").write_bytes(b"what a file system leaves behind")
    (folder / "notes.txt").write_text("")
    (folder / "cover.jpg").write_bytes(b"no number")
    assert levels(FrameFolder(folder).read_video(0, 1, 3)[0]) == [1, 2]


def test_frames_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    for make in (lambda: None, folder.mkdir):
        make()
        with pytest.raises(MediaError, match=str(folder)):
            FrameFolder(folder)
    clip = FrameFolder(write_frames(folder, range(1, 7)))
    with pytest.raises(MediaError, match=str(folder)):
        clip.read_video(5.0, 1.0, 3.0)
    (folder / "00004.jpg").write_bytes(b"not a picture")
    assert levels(clip.read_video(0.0, 1.0, 3.0)[0]) == [1, 2, 3]
    with pytest.raises(MediaError, match=r"00004\.jpg"):
        clip.read_video(0.0, 2.0, 3.0)
    write_frames(folder, [4], size=(9, 10))  # differs from the other frames
    with pytest.raises(MediaError, match=str(folder)):
        clip.read_video(0.0, 2.0, 3.0)


def test_the_cache_changes_nothing_and_spares_reading(tmp_path: Path) -> None:
    cached = FrameFolder(write_frames(tmp_path / "clip", range(1, 5)), cache=FileCache(10**6))
    cached.fill_cache()
    assert len(cached._cache._entries if cached._cache else ()) == 4
    for _ in range(2):
        frames, _ = cached.read_video(0.0, 2.0, 3.0)
        assert levels(frames) == [1, 2, 3, 4]
        frames.zero_()  # must not change the cache
