"""Windows and frame choice against the reference cases, and their properties."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.clips import clip_start, dense_clip_starts, paired_window, repeated
from common.data.media import frame_count, restrict, select_frames

TIMING = json.loads((Path(__file__).parents[1] / "golden/avid_cma/timing.json").read_text())
DRAW = st.floats(0.0, 1.0, exclude_max=True)
LIMITS = st.tuples(st.floats(-1.0, 5.0), st.floats(0.1, 20.0)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@pytest.mark.parametrize("case", TIMING["snippet_windows"])
def test_paired_windows_equal_the_reference(case: dict) -> None:
    window = paired_window(
        tuple(case["video"]), tuple(case["audio"]), 0.5, 2.0, case["max_offsync"], (case["u"], case["u"])
    )
    if case["result"] is None:
        assert window is None
    else:
        assert window is not None
        assert window == pytest.approx((case["result"]["video_start"], case["result"]["audio_start"]), abs=1e-9)


@pytest.mark.parametrize("case", TIMING["frame_selection"])
def test_frame_choice_equals_the_reference(case: dict) -> None:
    end = case["src_frames"] / case["src_fps"]
    indices, start = select_frames(case["start"], case["duration"], case["video_fps"], case["src_fps"], end)
    assert indices.tolist() == case["frame_indices"]
    assert start == pytest.approx(case["actual_start"], abs=1e-9)


@pytest.mark.parametrize("case", TIMING["dense_chunk_starts"])
def test_dense_clips_equal_the_reference(case: dict) -> None:
    starts = dense_clip_starts(case["num_frames"], case["chunk"], case["clips"])
    # None in the reference: the video is not longer than a clip, and every clip is the whole of it.
    assert starts.tolist() == (case["starts"] or [0] * case["clips"])


def test_streams_that_are_too_short_are_refused() -> None:
    assert paired_window((0.0, 10.0), (0.0, 2.0), 0.5, 2.0, 0.5, (0.5, 0.5)) is None
    assert paired_window((0.0, 0.4), (0.0, 10.0), 0.5, 2.0, 0.5, (0.5, 0.5)) is None
    assert paired_window((0.0, 3.0), (3.0, 6.0), 0.5, 2.0, 0.5, (0.5, 0.5)) is None


@given(LIMITS, LIMITS, st.floats(0.1, 3.0), st.floats(0.1, 3.0), st.floats(0.0, 1.0), DRAW, DRAW)
def test_the_shorter_clip_lies_in_the_widened_window_of_the_longer(
    video: tuple[float, float],
    audio: tuple[float, float],
    video_duration: float,
    audio_duration: float,
    jitter: float,
    first: float,
    second: float,
) -> None:
    window = paired_window(video, audio, video_duration, audio_duration, jitter, (first, second))
    slack = 1e-9
    swap = audio_duration <= video_duration
    outer_limits, inner_limits = (video, audio) if swap else (audio, video)
    longer, shorter = max(video_duration, audio_duration), min(video_duration, audio_duration)
    low, high = max(video[0], audio[0]), min(outer_limits[1] - longer, inner_limits[1] - shorter)
    if window is None:
        assert high <= low
        return
    outer, inner = window if swap else window[::-1]
    assert low - slack <= outer <= high + slack
    assert inner_limits[0] - slack <= inner <= inner_limits[1] + slack
    assert inner >= outer - jitter - slack
    assert inner + shorter <= outer + longer + jitter + slack


@given(LIMITS, DRAW, st.floats(0.1, 3.0), st.floats(1.0, 60.0), st.floats(1.0, 60.0))
def test_chosen_frames_exist_and_follow_each_other(
    limits: tuple[float, float], draw: float, duration: float, video_fps: float, source_fps: float
) -> None:
    origin, end = limits
    start = clip_start(limits, duration, draw)
    indices, actual = select_frames(start, duration, video_fps, source_fps, end, origin)
    assert len(indices) <= frame_count(duration, video_fps)
    assert np.all(np.diff(indices) >= 0)
    if len(indices):
        assert indices[0] >= 0
        assert origin + indices[-1] / source_fps <= end + 1e-9
        assert abs(actual - start) <= 1.0 / source_fps + 1e-9


@pytest.mark.parametrize("fps", [3.0, 24000 / 1001, 25.0, 30.0])
@pytest.mark.parametrize("origin", [0.0, 0.4])
def test_a_clip_that_begins_with_a_frame_skips_none(fps: float, origin: float) -> None:
    for first in range(400):
        start, end = origin + first / fps, origin + 400 / fps
        indices, actual = select_frames(start, 8 / fps, fps, fps, end, origin)
        assert indices.tolist() == list(range(first, min(first + 8, 400)))
        assert actual == pytest.approx(start)


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 30))
def test_dense_clips_lie_in_the_video(num_frames: int, clip_frames: int, clips: int) -> None:
    starts = dense_clip_starts(num_frames, clip_frames, clips)
    assert len(starts) == clips
    assert starts.min() >= 0
    assert starts.max() + min(clip_frames, num_frames) <= num_frames
    assert np.all(np.diff(starts) >= 0)


@given(LIMITS, DRAW)
def test_a_clip_ends_before_the_file_where_it_can(limits: tuple[float, float], draw: float) -> None:
    start = clip_start(limits, 4.1, draw)
    assert limits[0] <= start
    assert start + 4.1 <= max(limits[1], limits[0] + 4.1) + 1e-9


def test_a_sound_that_is_too_short_starts_over() -> None:
    assert repeated(torch.arange(5), 3, 6).tolist() == [3, 4, 0, 1, 2, 3]


def test_frame_counts_survive_rounding() -> None:
    assert frame_count(0.29, 100.0) == 29
    assert frame_count(0.5, 16.0) == 8
    assert frame_count(0.99, 1.0) == 0


def test_listed_segments_restrict_the_stream() -> None:
    assert restrict((0.0, 10.0), None, None) == (0.0, 10.0)
    assert restrict((0.5, 10.0), 0.0, 12.0) == (0.5, 10.0)
    assert restrict((0.0, 10.0), 2.0, 8.0) == (2.0, 8.0)
