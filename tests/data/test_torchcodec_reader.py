"""torchcodec in place of PyAV: the same frames and samples, by time stamp."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from common.data import torchcodec_reader
from common.data.media import MediaFile
from common.errors import StageError
from tests.data.media_factory import tone, write_audio, write_video

loads = pytest.mark.skipif(
    bool(torchcodec_reader.why_missing()), reason=torchcodec_reader.why_missing() or "torchcodec loads"
)
#: Sound: a step of 16 bits, where the system's FFmpeg is another release than PyAV's. Pictures: a level of 255.
STEP = 1.5 / 32767


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether torchcodec gave what was asked for, reading by reading."""
    given: list[bool] = []
    for name in ("read_frames", "read_samples"):
        genuine = getattr(torchcodec_reader, name)

        def watched(*args: object, genuine=genuine) -> object:
            found = genuine(*args)
            given.append(found is not None)
            return found

        monkeypatch.setattr(torchcodec_reader, name, watched)
    return given


def _compare(path: Path, monkeypatch: pytest.MonkeyPatch, starts: tuple[float, ...]) -> None:
    for start in starts:
        found = []
        for reader in torchcodec_reader.READERS:
            monkeypatch.setenv(torchcodec_reader.SWITCH, reader)
            with MediaFile(path) as media:
                frames = media.read_video(start, 0.5, 16.0) if media.video_limits else (torch.zeros(0), 0.0)
                found.append((*frames, media.read_audio(start, 0.4, 16_000)))
        ours, other = found
        assert ours[0].shape == other[0].shape
        assert ours[1] == other[1]
        assert not ours[0].numel() or (ours[0].int() - other[0].int()).abs().max() <= 1
        assert ours[2].shape == other[2].shape
        assert (ours[2] - other[2]).abs().max() <= STEP


@loads
@pytest.mark.parametrize(("suffix", "b_frames"), [(".mp4", 2), (".mkv", 2), (".avi", 0), (".flac", 0), (".mp3", 0)])
def test_the_same_frames_and_samples(
    tmp_path: Path, suffix: str, b_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"film{suffix}"
    if suffix in (".flac", ".mp3"):
        write_audio(path, tone(4.0, 22_050, channels=2), 22_050)
    else:
        write_video(
            path, seconds=4.0, b_frames=b_frames, audio=tone(4.0, 22_050, channels=2), audio_rate=22_050, size=(34, 50)
        )
    given = _counted(monkeypatch)
    _compare(path, monkeypatch, (0.0, 0.31, 1.7, 2.9, 3.8))
    # At the very end torchcodec may find nothing to begin with; PyAV reads there.
    assert sum(given) >= max(len(given) - 1, 4)


@loads
def test_a_film_whose_frames_are_off_their_grid_is_read_by_pyav(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two frames within a step the first is taken, and one that is held longer is repeated."""
    path = tmp_path / "uneven.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        time = 0
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 8 + 3 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            time += (1, 1, 3, 1, 5, 1)[number % 6]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    given = _counted(monkeypatch)
    for start in (0.0, 0.7, 1.9):
        found = []
        for reader in torchcodec_reader.READERS:
            monkeypatch.setenv(torchcodec_reader.SWITCH, reader)
            with MediaFile(path) as media:
                found.append(media.read_video(start, 0.5, 16.0)[0])
        assert torch.equal(*found)
    assert not all(given)


def test_a_reader_that_is_none_or_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "film.mp4", seconds=1.0)
    monkeypatch.setenv(torchcodec_reader.SWITCH, "torchcodecs")
    with MediaFile(path) as media, pytest.raises(StageError, match="did you mean 'torchcodec'"):
        media.read_video(0.0, 0.5, 16.0)
    monkeypatch.setenv(torchcodec_reader.SWITCH, "torchcodec")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    torchcodec_reader.why_missing.cache_clear()
    try:
        with MediaFile(path) as media, pytest.raises(StageError, match=r"ASSEMBLE_READER=torchcodec, but torchcodec"):
            media.read_audio(0.0, 0.5, 16_000)
        monkeypatch.setenv(torchcodec_reader.SWITCH, "")
        with MediaFile(path) as media:
            assert len(media.read_audio(0.0, 0.5, 16_000)) == 8_000
    finally:
        torchcodec_reader.why_missing.cache_clear()


def test_a_record_names_it_where_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(torchcodec_reader.SWITCH, raising=False)
    assert torchcodec_reader.versions() == {}
    monkeypatch.setenv(torchcodec_reader.SWITCH, "torchcodec")
    monkeypatch.setattr(torchcodec_reader, "why_missing", lambda: "not installed")
    assert torchcodec_reader.versions() == {}  # a stage without clips trains all the same
    monkeypatch.setattr(torchcodec_reader, "why_missing", lambda: "")
    monkeypatch.setattr(torchcodec_reader, "version", lambda: "0.17.0")
    assert torchcodec_reader.versions() == {"torchcodec": "0.17.0"}
