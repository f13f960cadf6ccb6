"""Videos written anew: what changes, what does not, and going on after a stop."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from common.commands.main import main
from common.data import transcoding
from common.data.media import MediaError, MediaFile, probe
from common.data.transcoding import FAILED, longest_group, transcode, transcode_folder
from tests.data.media_factory import write_video


def _film(path: Path, with_audio: bool = True) -> Path:
    return write_video(path, seconds=4.0, size=(96, 128), audio_rate=16_000, key_frame_every=100, with_audio=with_audio)


def test_a_film_keeps_its_times_and_sound_and_gets_short_groups(tmp_path: Path) -> None:
    film, output = _film(tmp_path / "film.mp4"), tmp_path / "new" / "film.mp4"
    assert longest_group(film) > 32
    transcode(film, output, short_side=48)
    assert longest_group(output) == 32
    before, after = probe(film), probe(output)
    assert after.video_fps == pytest.approx(before.video_fps)
    with MediaFile(film) as old, MediaFile(output) as new:
        wanted, start = old.read_video(1.3, 0.5, 16.0)
        found, other = new.read_video(1.3, 0.5, 16.0)
        assert found.shape[1:3] == (48, 64)
        assert start == pytest.approx(other, abs=0.01)
        shrunk = wanted.float().unflatten(1, (48, 2)).unflatten(3, (64, 2)).mean((2, 4))
        assert (found.float() - shrunk).abs().mean() < 8
        np.testing.assert_allclose(old.read_audio(1.0, 1.0, 16_000), new.read_audio(1.0, 1.0, 16_000), atol=1e-3)


def test_small_and_silent_films(tmp_path: Path) -> None:
    film = _film(tmp_path / "film.avi", with_audio=False)
    transcode(film, tmp_path / "out.mp4")
    info = probe(tmp_path / "out.mp4")
    assert info.audio_limits is None
    with MediaFile(tmp_path / "out.mp4") as media:
        assert media.read_video(0, 0.1, 16.0)[0].shape[1:3] == (96, 128)


def test_a_folder_goes_on_and_names_what_fails(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    _film(source / "train" / "a.mp4")
    _film(source / "train" / "b.avi")
    (source / "train" / "broken.mp4").write_bytes(b"no film")
    for name in ("train.csv", "subtitles.jsonl"):
        (source / name).write_text("label\n")
    done = transcode_folder(source, target, workers=2)
    assert (done.written, done.kept, done.lists) == (2, 0, 2)
    assert list(done.failed) == ["train/broken.mp4"]
    assert (target / FAILED).read_text().startswith("train/broken.mp4\t")
    assert {path.name for path in target.rglob("*.*")} == {FAILED, "a.mp4", "b.mp4", "train.csv", "subtitles.jsonl"}
    (target / "train" / "a.mp4").unlink()
    (source / "train" / "broken.mp4").unlink()
    again = transcode_folder(source, target, workers=1)
    assert (again.written, again.kept, again.failed) == (1, 1, {})
    assert not (target / FAILED).exists()
    # What was repaired since is written again.
    (source / "train.csv").write_text("youtube_id\n")
    os.utime(target / "train" / "a.mp4", (0, 0))
    again = transcode_folder(source, target, workers=1)
    assert (again.written, again.kept) == (1, 1)
    assert (target / "train.csv").read_text() == "youtube_id\n"


def test_links_to_folders_are_followed_and_odd_names_are_told(tmp_path: Path) -> None:
    _film(tmp_path / "disk2" / "a.mp4")
    source = tmp_path / "source"
    source.mkdir()
    (source / "train").symlink_to(tmp_path / "disk2")
    (source / os.fsdecode(b"bad\xff.mp4")).write_bytes(b"no film")
    done = transcode_folder(source, tmp_path / "target", workers=1)
    assert (tmp_path / "target" / "train" / "a.mp4").is_file()
    assert done.written == 1
    assert (tmp_path / "target" / FAILED).read_bytes().startswith(b"bad\xff.mp4\t")


@pytest.mark.parametrize(
    ("size", "expected"), [((1280, 720), (512, 288)), ((1280, 722), (510, 288)), ((320, 175), (320, 174))]
)
def test_sides_are_even_and_the_shorter_one_no_more_than_wanted(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert transcoding._size(*size, 288) == expected


def test_two_videos_that_would_become_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a.avi", "a.mkv", "b.avi"):
        (tmp_path / "source" / name).write_bytes(b"no film")
    with pytest.raises(ValueError, match=r"source/a\.avi and .*source/a\.mkv would both become a\.mp4"):
        transcode_folder(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_what_is_not_as_it_should_be_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = _film(tmp_path / "film.mp4")
    monkeypatch.setattr(transcoding, "longest_group", lambda path: 250)
    with pytest.raises(MediaError, match="a key frame comes after 250 pictures and not after 32"):
        transcode(film, tmp_path / "out" / "film.mp4")
    assert not list((tmp_path / "out").iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, target = tmp_path / "data", tmp_path / "small"
    _film(data / "kinetics400" / "train" / "juggling" / "abcdefghijk_000000_000004.mp4")
    assert main(["data", "avid", "--data", str(data), "--transcode", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "kinetics400: 1 videos written, 0 from before" in printed
    assert longest_group(target / "kinetics400/train/juggling/abcdefghijk_000000_000004.mp4") == 32
    assert main(["data", "avid", "--data", str(data), "--transcode", str(data)]) == 2
