"""Test the listings, their fingerprints, and the index that stores them."""

from __future__ import annotations

import functools
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.datasets import base
from common.data.datasets.audioset import AudioSet, write_audioset
from common.data.datasets.base import MediaDataset, placeholder
from common.data.datasets.kinetics import Kinetics400, write_kinetics
from common.data.listing import Clip, Listing, joined
from tests.data.media_factory import listing_of

ROOT = Path("/data/set")

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
seconds = st.none() | st.floats(0, 1e6)
clips = st.builds(
    lambda name, label, sound, fold, start, end: Clip(ROOT / name, label, sound, fold, start, end),
    names,
    st.integers(-1, 9),
    st.integers(-1, 9),
    st.integers(0, 5),
    seconds,
    seconds,
)
make = functools.partial(listing_of, ROOT)


def some(count: int = 6) -> list[Clip]:
    return [Clip(ROOT / f"video {n}.mp4", n % 3, fold=n % 2) for n in range(count)]


@given(st.lists(clips, max_size=8))
@settings(max_examples=60)
def test_the_table_gives_back_the_clips(rows: list[Clip]):
    listing = make(rows)
    assert list(listing) == rows
    assert listing == rows
    assert listing.labels.tolist() == [clip.label for clip in rows]
    if rows:
        assert listing[-1] == rows[-1]
        assert listing[: len(rows) - 1] == rows[:-1]
    with pytest.raises(IndexError):
        listing[len(rows)]
    assert pickle.loads(pickle.dumps(listing)).fingerprint() == listing.fingerprint()


def test_the_fingerprint_is_the_same_in_every_release():
    # Checkpoints store the fingerprint. A changed fingerprint would make every stored memory bank unusable.
    rows = [Clip(ROOT / "a/ä.mp4", 0), Clip(ROOT / "b.mp4", 1, 2, 3, 0.5, 1.5)]
    assert make(rows).fingerprint() == "4c8c6f761af3af6d6b766925bd929e5be19f0e49c9ff570f2012b825d8f3da5b"


def test_only_a_name_that_leads_up_is_resolved_by_its_spelling(tmp_path: Path):
    """Apply a leading `..` to the root's path as spelled. With other names, keep links and `..` in the root."""
    root = tmp_path / "a" / ".." / "set"
    assert joined(root, "b.mp4") == root / "b.mp4"
    assert joined(root, "..b/c.mp4") == root / "..b/c.mp4"
    assert joined(tmp_path / "link", "../beside/b.mp4") == tmp_path / "beside" / "b.mp4"


def test_subset_takes_rows_in_the_given_order():
    listing = make(some())
    part = listing.subset([4, 0, 4])
    assert [clip.path.name for clip in part] == ["video 4.mp4", "video 0.mp4", "video 4.mp4"]
    assert part.classes == listing.classes
    assert part.version == "1, 3 of 6"
    assert listing.subset(np.arange(6)).fingerprint() == listing.fingerprint()


# ------------------------------------------------------------------------------------------------------------- indices
@pytest.fixture
def index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of stored indices, and store small listings as well."""
    monkeypatch.setattr(base, "INDEX_FROM", 4)
    return cache / "indices"


def listed(dataset: MediaDataset, split: str = "train") -> Listing:
    """List a split, with pauses before and after, because the file system's time stamps are coarse."""
    time.sleep(0.02)
    found = dataset.listing(split)
    time.sleep(0.02)
    return found


def test_the_index_is_used_and_equals_the_listing(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch):
    root = write_audioset(tmp_path / "data", clips=4, listed=6)
    dataset = AudioSet(root, trimmed=False)
    fresh = listed(dataset)
    assert (index / f"{dataset.index_name('unbalanced_train')}.npz").is_file()
    monkeypatch.setattr(AudioSet, "_scan", lambda *_: pytest.fail("the folder was read although an index was there"))
    stored = dataset.listing("train")
    for name in ("name", "version", "classes", "root", "missing", "missing_names", "layout", "notes"):
        assert getattr(stored, name) == getattr(fresh, name), name
    assert stored == fresh
    assert stored.fingerprint() == fresh.fingerprint()
    # Different arguments give a different listing, and so a different index.
    assert AudioSet(root).index_name("train") != dataset.index_name("train")


@pytest.mark.parametrize(
    ("flat", "change"),
    [
        *((False, change) for change in ("added", "removed", "replacement", "class")),
        *((True, change) for change in ("added", "removed", "replacement", "list")),
    ],
)
def test_a_change_makes_the_index_stale(tmp_path: Path, index: Path, flat: bool, change: str):
    root = write_kinetics(tmp_path / "data", flat=flat, clips_per_class=3)
    dataset = Kinetics400(root)
    before = listed(dataset)
    assert len(list(index.iterdir())) == 1
    folder = root / "train" if flat else root / "train" / "abseiling"
    first = before[0].path
    if change == "added":
        placeholder(folder / "newvideo000_000000_000010.mp4")
    elif change == "removed":
        first.unlink()
    elif change == "class":
        write_kinetics(root, ["archery"], folders=["val"])
    elif change == "replacement":
        (root / "replacement").mkdir()
        placeholder(root / "replacement" / first.name)
    else:
        path = root / "annotations" / "train.csv"
        path.write_text(path.read_text().replace("tai chi", "zumba"))
    after = dataset.listing("train")
    unchanged = after.fingerprint() == before.fingerprint() and after.classes == before.classes
    # A new file changes nothing if the data set takes its clips from a list.
    assert unchanged == (flat and change == "added")


def test_an_archive_that_sets_the_time_of_the_folder_back_is_noticed(tmp_path: Path, index: Path):
    root = write_kinetics(tmp_path / "data")
    folder = root / "train" / "abseiling"
    os.utime(folder, (1e9, 1e9))
    before = listed(Kinetics400(root))
    placeholder(folder / "newvideo000_000000_000010.mp4")
    os.utime(folder, (1e9, 1e9))
    assert len(Kinetics400(root).listing("train")) == len(before) + 1


def test_an_index_is_only_kept_where_it_pays_and_changes_would_show(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = Kinetics400(write_kinetics(tmp_path / "data"))
    monkeypatch.setattr("common.files.SETTLED_SECONDS", 3600.0)
    listed(dataset)
    monkeypatch.setattr("common.files.SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(base, "INDEX_FROM", 5)
    listed(dataset)
    assert not index.exists()


def test_a_damaged_index_is_ignored_and_one_that_cannot_be_written_no_error(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = Kinetics400(write_kinetics(tmp_path / "data"))
    listed(dataset)
    (kept,) = index.iterdir()
    for damage in (b"", b"PK", b"{}"):
        kept.write_bytes(damage)
        assert len(dataset.listing("train")) == 4
    monkeypatch.setenv("ASSEMBLE_CACHE", str(kept))
    assert len(listed(dataset)) == 4
