"""TVC in its real layout: moments in JSON lines, frames and subtitles of TVQA."""

from pathlib import Path

import pytest

from common.data.datasets.tvc import TVC
from common.data.listing import DatasetMissing
from tests.data.text_layouts import CLIPS, moment, write_lines, write_tvc, write_tvqa


@pytest.fixture(params=["here", "beside", "named"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> TVC:
    """Frames and subtitles in the same folder, in the folder of TVQA beside it, or in another one."""
    root = tmp_path / "tvc"
    write_tvc(root)
    clips = {"here": root, "beside": tmp_path / "tvqa", "named": tmp_path / "elsewhere/films"}[request.param]
    write_tvqa(clips)
    return TVC(root, clips if request.param == "named" else None)


def test_rows_and_moments_are_aligned(dataset: TVC) -> None:
    for split, count in (("train", 2), ("val", 4)):
        listing, moments = dataset.listing(split), dataset.moments(split)
        assert len(listing) == len(moments) == 4
        for clip, own in zip(listing, moments):
            assert clip.path.name == own.clip
            assert clip.path.is_dir()
            assert (clip.start, clip.end) == own.span
            assert len(own.descriptions) == count
    assert moments[0].descriptions[1].text.startswith("Moment ")
    assert "  " not in moments[0].descriptions[0].text
    assert moments[0].descriptions[0].kind == "vt"
    assert len(dataset.subtitles()[CLIPS[0]]) == 2
    assert dataset.words() == {}


def test_names_and_fingerprint_are_the_same_wherever_the_folders_lie(tmp_path: Path) -> None:
    listings = []
    for place in (tmp_path / "one", tmp_path / "two" / "deeper"):
        write_tvc(place / "tvc")
        write_tvqa(place / "tvqa")
        listings.append(TVC(place / "tvc").listing("train"))
    first, second = listings
    assert first.fingerprint() == second.fingerprint()
    assert first.names == second.names
    assert first.names[0].startswith("../tvqa/")
    # A link to the root does not change what lies beside it.
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "tvc").symlink_to(tmp_path / "one" / "tvc")
    write_tvqa(linked / "tvqa")
    assert str(TVC(linked / "tvc").listing("train")[0].path).startswith(str(linked / "tvqa"))


def test_withheld_descriptions(dataset: TVC) -> None:
    assert [own.descriptions for own in dataset.moments("test_public")] == [(), ()]
    status = dataset.status()
    assert status.present
    assert status.counts == {"train": 4, "val": 4, "test": 2}


def test_unknown_clips_and_missing_files(tmp_path: Path) -> None:
    root = write_tvc(tmp_path / "tvc")
    with pytest.raises(DatasetMissing, match=r"the frames are missing; looked in .*tvqa/frames_hq"):
        TVC(root).listing("train")
    with pytest.raises(DatasetMissing, match="the subtitles are missing"):
        TVC(root).subtitles()
    write_tvqa(root)
    write_lines(root / "data/tvc_val_release.jsonl", [])
    write_lines(root / "tvc_train_release.jsonl", [moment(0, CLIPS[0]), moment(1, "unknown")])
    listing = TVC(root).listing("train")
    assert (len(listing), listing.missing_names) == (1, ("unknown (moment 1)",))
    (root / "tvc_val_release.jsonl").unlink()
    with pytest.raises(DatasetMissing, match="none of the clips of split 'val'"):
        TVC(root).listing("val")
    (root / "data/tvc_val_release.jsonl").unlink()
    with pytest.raises(DatasetMissing, match="the moments are missing"):
        TVC(root).moments("val")
