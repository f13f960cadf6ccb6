"""Folders of numbered frames read as clips."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.data.media import FileCache, FrameFolder, MediaError, MediaFile, open_media
from tests.data.media_factory import write_video
from tests.data.text_layouts import write_frames


def levels(frames: torch.Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / 10) for frame in frames]


def test_frames_lie_on_their_time(tmp_path: Path) -> None:
    clip = FrameFolder(write_frames(tmp_path / "clip", range(1, 13)))
    assert clip.video_limits == (0.0, 4.0)
    assert clip.audio_limits is None
    frames, start = clip.read_video(0.0, 4.0, 3.0)
    assert levels(frames) == list(range(1, 13))
    assert frames.dtype == torch.uint8
    assert frames.shape == (12, 8, 10, 3)
    assert start == 0.0
    frames, start = clip.read_video(1.4, 1.0, 3.0)
    assert levels(frames) == [5, 6, 7]
    assert start == pytest.approx(4 / 3)


def test_another_rate_repeats_or_leaves_out(tmp_path: Path) -> None:
    clip = FrameFolder(write_frames(tmp_path / "clip", range(1, 7)))
    assert levels(clip.read_video(0.0, 2.0, 6.0)[0]) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert levels(clip.read_video(0.0, 2.0, 1.5)[0]) == [1, 3, 5]


def test_missing_numbers_hold_the_frame_before(tmp_path: Path) -> None:
    clip = FrameFolder(write_frames(tmp_path / "clip", [2, 3, 6]))
    assert clip.video_limits == (0.0, 2.0)
    assert levels(clip.read_video(0.0, 2.0, 3.0)[0]) == [2, 2, 3, 3, 3, 6]


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", [1, 2])
    (folder / "._00003.jpg").write_bytes(b"what a file system leaves behind")
    (folder / "notes.txt").write_text("")
    (folder / "cover.jpg").write_bytes(b"no number")
    assert FrameFolder(folder).video_limits == (0.0, pytest.approx(2 / 3))


def test_other_names_and_formats(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", [1, 2], suffix="png")
    (folder / "00002.png").rename(folder / "frame_00002.PNG")
    assert levels(FrameFolder(folder).read_video(0, 1, 3)[0]) == [1, 2]


@pytest.mark.parametrize("make", ["absent", "empty", "a file"])
def test_a_folder_without_frames(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "clip"
    if make == "empty":
        folder.mkdir()
    elif make == "a file":
        folder.write_bytes(b"")
    with pytest.raises(MediaError, match="clip"):
        FrameFolder(folder)


def test_broken_frames_and_wrong_windows(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", range(1, 7))
    (folder / "00004.jpg").write_bytes(b"not a picture")
    clip = FrameFolder(folder)
    assert levels(clip.read_video(0.0, 1.0, 3.0)[0]) == [1, 2, 3]
    with pytest.raises(MediaError, match=r"00004\.jpg"):
        clip.read_video(0.0, 2.0, 3.0)
    with pytest.raises(MediaError, match="no frame between"):
        clip.read_video(5.0, 1.0, 3.0)
    with pytest.raises(MediaError, match="no audio"):
        clip.read_audio(0.0, 1.0, 8000)
    write_frames(folder, [4], size=(9, 10))
    with pytest.raises(MediaError, match="clip"):
        clip.read_video(0.0, 2.0, 3.0)


def test_the_cache_changes_nothing_and_spares_reading(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", range(1, 5))
    cached = FrameFolder(folder, cache=FileCache(10**6))
    cached.fill_cache()
    plain, _ = FrameFolder(folder).read_video(0.0, 2.0, 3.0)
    again, _ = cached.read_video(0.0, 2.0, 3.0)
    assert torch.equal(plain, again)
    again.zero_()
    assert levels(cached.read_video(0.0, 2.0, 3.0)[0]) == [1, 2, 3, 4]


def test_open_media_tells_files_and_folders_apart(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", [1])
    film = write_video(tmp_path / "clip.mp4", 0.5)
    cache = FileCache(10**7)
    for path, kind in ((folder, FrameFolder), (film, MediaFile)):
        for own in (None, cache):
            with open_media(path, own) as media:
                assert isinstance(media, kind)
                assert np.isfinite(media.video_limits or ()).all()
    with pytest.raises(MediaError), open_media(tmp_path / "absent", cache):
        pass
