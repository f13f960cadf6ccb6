"""Test the check for picture and sound in clips: it runs once, stores its result, and resumes after a stop."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from common.data import durations as module
from common.data.datasets.audioset import AudioSet, write_audioset
from common.data.datasets.kinetics import Kinetics400
from common.data.durations import common_seconds, kept_at, long_enough
from common.data.item_dataset import TooManyBrokenFiles
from common.data.listing import Clip, Listing
from common.data.media import MediaError, MediaInfo
from tests.data.media_factory import listing_of, write_video

FILES = {"a.mp4": 2.0, "b.mp4": 3.0, "c.mp4": 1.0}


@pytest.fixture
def listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Listing:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "files"
    root.mkdir()
    for name, seconds in FILES.items():
        write_video(root / name, seconds=seconds, fps=8.0, size=(16, 16), audio_rate=8_000)
    write_video(root / "d.mp4", seconds=3.0, fps=8.0, size=(16, 16), audio_rate=8_000, with_audio=False)
    clips = [Clip(root / name, 0) for name in (*FILES, "d.mp4")]
    clips += [Clip(root / "b.mp4", 0, start=2.0), Clip(root / "b.mp4", 0, start=4.0)]
    return listing_of(root, clips)


def test_short_and_silent_clips_are_left_out_and_told(listing: Listing) -> None:
    left = long_enough(listing, 1.5)
    assert left.names == ["a.mp4", "b.mp4"]
    assert left.version == "1, more than 1.5 s of picture and sound"
    assert left.notes == (
        "4 of 6 clips are left out: 1 without picture or sound, 3 with 1.5 s or less of both, 0 unreadable",
    )
    assert left.fingerprint() != listing.fingerprint()
    assert long_enough(listing, float(common_seconds(listing)[0])).names == ["b.mp4"]
    with pytest.raises(ValueError, match="test: no clip has picture and sound for more than 9 s"):
        long_enough(listing, 9)


def test_what_is_known_is_not_asked_again(
    listing: Listing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    asked: list[str] = []
    probe = module._of_clip

    def counted(clip: Clip) -> float:
        asked.append(clip.path.name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return probe(clip)

    monkeypatch.setattr(module, "_of_clip", counted)
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    with pytest.raises(KeyboardInterrupt):
        common_seconds(listing)
    assert np.isnan(np.load(kept_at(listing))).sum() == 4
    first = common_seconds(listing)
    assert asked == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "c.mp4", "d.mp4", "b.mp4", "b.mp4"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [f"  test: checking for sound, {done} of 4 files" for done in (0, 2)]
    np.testing.assert_array_equal(common_seconds(listing), first)
    assert first == pytest.approx([2.0, 3.0, 1.0, -1.0, 1.0, 0.0], abs=0.15)
    kept_at(listing).write_bytes(b"damaged")
    np.testing.assert_array_equal(common_seconds(listing), first)


def test_a_broken_file_is_looked_at_again_as_the_note_says(listing: Listing, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (listing.root / "a.mp4").read_bytes()
    (listing.root / "a.mp4").write_bytes(b"broken")
    with pytest.raises(TooManyBrokenFiles, match=r"a\.mp4"):
        long_enough(listing, 1.0)
    monkeypatch.setattr(module, "MOST_UNREADABLE", 0.5)
    left = long_enough(listing, 1.0)
    assert f"delete durations/{kept_at(listing).name} in the cache folder" in left.notes[-1]
    (listing.root / "a.mp4").write_bytes(whole)
    assert len(long_enough(listing, 1.0)) == len(left)
    kept_at(listing).unlink()
    assert len(long_enough(listing, 1.0)) == len(left) + 1


def test_what_the_system_refuses_for_now_is_not_remembered(listing: Listing, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> MediaInfo:
        raise MediaError.of(path, "cannot be opened") from OSError(errno.EIO, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(module, "MediaFile", refused)
        with pytest.raises(MediaError, match="cannot be opened"):
            long_enough(listing, 1.0)
    assert len(long_enough(listing, 1.5)) == 2


def test_data_sets_list_what_sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "kinetics400" / "train" / "juggling"
    folder.mkdir(parents=True)
    for number in range(3):
        write_video(
            folder / f"video{number:06d}_000000_000002.mp4", seconds=2.0, fps=8.0, size=(16, 16), audio_rate=8_000,
            with_audio=number != 1,
        )  # fmt: skip
    data = Kinetics400(tmp_path / "kinetics400", common_seconds=1.0)
    assert len(data.listing("train")) == 2
    assert data.status().counts["train"] == 3  # the status opens no files
    assert len(Kinetics400(tmp_path / "kinetics400").listing("train")) == 3


def test_audioset_in_the_order_of_a_list(tmp_path: Path) -> None:
    root, chosen = write_audioset(tmp_path / "audioset"), tmp_path / "unbalanced_train-100k.txt"
    first, _, third = AudioSet(root).listing("train").names
    chosen.write_text("".join(f"{Path(name).name}\n" for name in (third, first)))
    assert AudioSet(root, chosen, in_list_order=True).listing("train").names == [third, first]
    assert AudioSet(root, chosen).listing("train").names == [first, third]
    with pytest.raises(ValueError, match="in_list_order needs"):
        AudioSet(root, in_list_order=True)
