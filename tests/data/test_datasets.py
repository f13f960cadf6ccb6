"""What all data sets have in common, and those of clips and sounds, on tiny copies of their layouts."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from common.data.datasets.audioset import AudioSet, write_audioset
from common.data.datasets.base import MediaDataset, placeholder, video_id
from common.data.datasets.coco_cn import COCOCN
from common.data.datasets.dcase import DCASE2014, write_dcase
from common.data.datasets.esc50 import ESC50, write_esc50
from common.data.datasets.hmdb51 import HMDB51, write_hmdb51
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.kinetics import Kinetics400, write_kinetics
from common.data.datasets.localized_narratives import LocalizedNarrativesOpenImages
from common.data.datasets.tvqa import TVQA
from common.data.datasets.ucf101 import UCF101, write_ucf101
from common.data.datasets.voc import PascalVOC
from common.data.listing import DatasetMissing
from tests.data.writers import PUBLISHED, WRITERS

ALL = (*WRITERS, COCOCN, LocalizedNarrativesOpenImages)


# ------------------------------------------------------------------------------------------------- all data sets alike
@pytest.mark.parametrize("kind", ALL)
def test_a_missing_and_an_empty_folder_explain_themselves(kind: type[MediaDataset], tmp_path: Path):
    for root in (tmp_path / "nowhere", tmp_path):
        dataset = kind(str(root))
        split, fold = dataset.parts()[0]
        with pytest.raises(DatasetMissing) as caught:
            dataset.listing(split, fold)
        message = str(caught.value)
        for part in (str(root), kind.title, kind.size, kind.license, kind.source, "make data-<paper>"):
            assert part in message
        layout = kind.expected_layout.splitlines()
        assert 2 <= len(layout) <= 6
        assert all(line in message for line in layout)
    status = dataset.status()
    assert not status.present
    assert status.problem
    assert status.dataset.root == tmp_path


@pytest.mark.parametrize(("kind", "sizes"), PUBLISHED.items())
def test_published_sizes(kind: type[MediaDataset], sizes: tuple[int | None, ...], tmp_path: Path):
    dataset = kind(tmp_path)
    assert (dataset.published_classes(), *(dataset.published_count(*part) for part in dataset.parts())) == sizes


@pytest.mark.parametrize("kind", ALL)
def test_unknown_split_and_fold_name_the_known_ones(kind: type[MediaDataset], tmp_path: Path):
    with pytest.raises(ValueError, match=f"no split 'training'; it has: {kind.splits[0]}"):
        kind(tmp_path).listing("training", 1)
    with pytest.raises(ValueError, match=r"folds 1 to|no folds"):
        kind(tmp_path).listing(kind.splits[0], 7)


@pytest.mark.parametrize("kind", WRITERS)
def test_listings_are_sorted_and_the_same_wherever_the_set_lies(kind: type[MediaDataset], tmp_path: Path):
    first = WRITERS[kind](tmp_path / "one")
    second = WRITERS[kind](tmp_path / "somewhere" / "else")
    for split, fold in kind(first).parts():
        if split in kind.optional_splits and kind in (Kinetics400, AudioSet):
            continue
        here, there = kind(first).listing(split, fold), kind(second).listing(split, fold)
        assert here.names == sorted(here.names)
        assert len(here) > 0
        assert here.names == there.names
        assert here.fingerprint() == there.fingerprint() == kind(first).listing(split, fold).fingerprint()
        assert here.classes == there.classes
        assert all(clip.path.exists() for clip in here)
        assert here.name == kind.name
        assert split in here.version
        if kind.num_classes and kind not in (PascalVOC, TVQA):
            # The clips of AudioSet have more labels than the first, which is the only one kept.
            assert {clip.label for clip in here} == set(range(2 if kind is AudioSet else len(here.classes)))


@pytest.mark.parametrize("kind", WRITERS)
def test_the_status_counts_and_says_what_differs_from_the_published_set(kind: type[MediaDataset], tmp_path: Path):
    dataset = kind(WRITERS[kind](tmp_path / "data"))
    status = dataset.status()
    assert status.present, status.problem
    assert status.layout
    assert any("published" in note for note in status.notes)
    if kind.num_classes and kind is not TVQA:
        assert any(f"classes, published {PUBLISHED[kind][0]}" in note for note in status.notes)
    assert dataset.unit == ("images" if "image" in kind.streams else "clips")


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind not in (Kinetics400, DCASE2014, ImageNet)])
def test_listed_files_that_are_missing_are_counted(kind: type[MediaDataset], tmp_path: Path):
    dataset = kind(WRITERS[kind](tmp_path / "data"))
    split, fold = dataset.parts()[0]
    before = dataset.listing(split, fold)
    first = before[0].path
    shutil.rmtree(first) if first.is_dir() else first.unlink()
    after = dataset.listing(split, fold)
    assert after.missing == len(after.missing_names) == len(before) - len(after) + before.missing > before.missing
    assert after.names == [name for name in before.names if name != before.names[0]]
    assert any("listed" in note and "are missing, such as" in note for note in dataset.status().notes)


# -------------------------------------------------------------------------------------------------------- Kinetics-400
@pytest.mark.parametrize("flat", [False, True])
def test_kinetics_layouts_give_the_same_labels(tmp_path: Path, flat: bool):
    root = write_kinetics(tmp_path, ["tai chi", "abseiling", "zumba"], 3, flat=flat)
    dataset = Kinetics400(root)
    train, validation = dataset.listing("train"), dataset.listing("validation")
    assert train.classes == validation.classes == ("abseiling", "tai chi", "zumba")
    assert len(train) == len(validation) == 9
    assert Counter(clip.label for clip in train) == {0: 3, 1: 3, 2: 3}
    # The writer numbers the videos by the position of the class in its argument.
    labels = {clip.path.stem: clip.label for clip in train}
    assert labels["t-000000000_000000_000010"] == 1
    assert labels["t-000000100_000000_000010"] == 0
    assert ("annotations/train.csv" in train.layout) == flat
    assert ("class folders" in train.layout) == (not flat)
    assert train[0].start is None


def test_kinetics_splits_number_the_classes_alike_when_one_lacks_a_class(tmp_path: Path):
    write_kinetics(tmp_path, ["archery", "bowling", "yoga"], 1, folders=["train"])
    write_kinetics(tmp_path, ["bowling", "yoga"], 1, folders=["val"])
    validation = Kinetics400(tmp_path).listing("val")
    assert [clip.label for clip in validation] == [1, 2]


@pytest.mark.parametrize("flat", [False, True])
def test_kinetics_replacements_take_the_place_of_corrupted_files(tmp_path: Path, flat: bool):
    root = write_kinetics(tmp_path, flat=flat)
    before = Kinetics400(root).listing("train")
    corrupted = before[1]
    replaced = root / "replacement" / "replacement_for_corrupted_k400" / corrupted.path.name
    replaced.parent.mkdir(parents=True)
    placeholder(replaced)
    after = Kinetics400(root).listing("train")
    assert len(after) == len(before)
    assert after.classes == before.classes
    by_name = {clip.path.name: clip for clip in after}
    assert by_name[replaced.name].path == replaced
    assert by_name[replaced.name].label == corrupted.label
    if flat:
        # A file that is only there as a replacement is not missing.
        corrupted.path.unlink()
        assert Kinetics400(root).listing("train").missing == 0


def test_kinetics_flat_counts_listed_clips_without_file_and_ignores_unlisted_files(tmp_path: Path):
    root = write_kinetics(tmp_path, flat=True, clips_per_class=3)
    placeholder(root / "train" / "unlistedvid_000000_000010.mp4")
    (root / "train" / "t-000000001_000010_000020.mp4").unlink()
    listing = Kinetics400(root).listing("train")
    assert len(listing) == 5
    assert listing.missing_names == ("t-000000001_000010_000020",)
    (root / "annotations" / "train.csv").unlink()
    with pytest.raises(DatasetMissing, match=r"annotations/train\.csv"):
        Kinetics400(root).listing("train")


# ------------------------------------------------------------------------------------------------------------ AudioSet
@pytest.mark.parametrize(
    "naming",
    ["{video}.mp4", "{video}_{start}.mp4", "{video}_{start}_{end}.mkv", "{video}_{start}000_{end}000.mp4",
     "{video}_{start}.000_{end}.000.webm", "Y{video}.mp4", "Y{video}_{start}.000.wav"],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["u", "Y_9", "-_"])
def test_audioset_names(tmp_path: Path, naming: str, prefix: str):
    listing = AudioSet(write_audioset(tmp_path, naming=naming, prefix=prefix)).listing("train")
    assert len(listing) == 3
    assert listing.missing == 0
    assert {video_id(n, prefix) in clip.path.name for n, clip in enumerate(listing)} == {True}


@pytest.mark.parametrize(
    ("folder", "list_name"),
    [
        ("unbalanced_train_segments/unbalanced_train_segments_part07", "metadata/unbalanced_train_segments.csv"),
        ("videos", "csv/unbalanced_train_segments.csv"),
        ("clips/ab/cd", "unbalanced_train_segments.csv"),
        ("", "unbalanced_train_segments.csv"),
    ],
)
def test_audioset_folders(tmp_path: Path, folder: str, list_name: str):
    listing = AudioSet(write_audioset(tmp_path, folder=folder, list_name=list_name)).listing("train")
    assert len(listing) == 3
    assert list_name in listing.layout


def test_audioset_tolerates_missing_clips_and_labels_by_the_first_sound(tmp_path: Path):
    root = write_audioset(tmp_path, clips=3, listed=7)
    listing = AudioSet(root).listing("unbalanced_train")
    assert len(listing) == 3
    assert listing.missing == 4
    assert listing.missing_names[0] == video_id(3, "u")
    assert listing.classes == ("/m/03k3r", "/m/09x0r", "/t/dd00088")
    assert [clip.label for clip in listing] == [1, 0, 1]
    assert [clip.sound_label for clip in listing] == [1, 0, 1]
    (root / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gargling, loud"\n2,/m/03k3r,"Whip"\n'
    )
    named = AudioSet(root).listing("unbalanced_train")
    assert named.classes == ("Speech", "Gargling, loud", "Whip")
    assert [clip.label for clip in named] == [0, 2, 0]


def test_audioset_splits_share_the_classes_and_a_video_comes_before_a_sound(tmp_path: Path):
    write_audioset(tmp_path, naming="audio/{video}.flac")
    write_audioset(tmp_path, clips=2, listed=3, naming="video/{video}.mp4")
    write_audioset(tmp_path, clips=1, folder="eval_segments", list_name="eval_segments.csv", prefix="e")
    dataset = AudioSet(tmp_path)
    assert dataset.listing("test").classes == dataset.listing("train").classes
    assert dataset.listing("eval")[0].path.parent.name == "eval_segments"
    assert sorted(clip.path.suffix for clip in dataset.listing("train")) == [".flac", ".mp4", ".mp4"]
    assert set(dataset.status().counts) == {"unbalanced_train", "evaluation"}


def test_audioset_clip_list_and_whole_videos(tmp_path: Path):
    write_audioset(tmp_path / "data", clips=5, naming="{video}.mp4")
    chosen = tmp_path / "hundred_thousand.txt"
    chosen.write_text(f"# chosen\n{video_id(3, 'u')}_30.mp4\n{video_id(1, 'u')}\n")
    listing = AudioSet(tmp_path / "data", clip_list=chosen, trimmed=False).listing("train")
    assert [(clip.path.stem, clip.start, clip.end) for clip in listing] == [
        (video_id(1, "u"), 10.0, 20.0),
        (video_id(3, "u"), 30.0, 40.0),
    ]
    published = AudioSet(tmp_path, clip_list=tmp_path / "unbalanced_train-100k.txt")
    assert [published.published_count(split) for split in ("unbalanced_train", "evaluation")] == [99_999, 20_371]
    assert AudioSet(tmp_path, clip_list=chosen).published_count("unbalanced_train") is None
    with pytest.raises(DatasetMissing, match=r"clip_list names .*gone\.txt"):
        AudioSet(tmp_path / "data", clip_list=tmp_path / "gone.txt").listing("train")


# ------------------------------------------------------------------------------------------------------------- UCF-101
def test_ucf101_folds_divide_the_clips(tmp_path: Path):
    dataset = UCF101(write_ucf101(tmp_path))
    everything = set()
    for fold in (1, 2, 3):
        train, test = dataset.listing("train", fold), dataset.listing("test", fold)
        names = set(train.names), set(test.names)
        assert not names[0] & names[1]
        assert len(names[0] | names[1]) == 12
        assert all(f"_g{fold:02d}_" in name for name in names[1])
        assert train.classes == test.classes == ("ApplyEyeMakeup", "YoYo")
        assert {clip.label for clip in test if "YoYo" in clip.path.name} == {1}
        everything.add(test.fingerprint())
    assert len(everything) == 3
    assert dataset.listing("validation", 1).fingerprint() == dataset.listing("test", 1).fingerprint()


def test_ucf101_converted_files(tmp_path: Path):
    folder = write_ucf101(tmp_path) / "UCF-101" / "YoYo"
    (folder / "v_YoYo_g01_c02.avi").rename(folder / "v_YoYo_g01_c02.mp4")
    assert UCF101(tmp_path).listing("test", 1)[-1].path.suffix == ".mp4"


# ------------------------------------------------------------------------------------------------------------- HMDB-51
@pytest.mark.parametrize("nested", [False, True])
def test_hmdb51_flags(tmp_path: Path, nested: bool):
    dataset = HMDB51(write_hmdb51(tmp_path, nested=nested))
    for fold in (1, 2, 3):
        train, test = dataset.listing("train", fold), dataset.listing("test", fold)
        # Per class: four clips, of which one is for testing and one is not used.
        assert (len(train), len(test)) == (4, 2)
        assert not set(train.names) & set(test.names)
        assert {clip.path.name[1] for clip in test} == {str(fold - 1)}
        assert {(clip.label, clip.path.parent.name) for clip in test} == {(0, "brush_hair"), (1, "wave")}
    with pytest.raises(ValueError, match="fold = 1 to 3"):
        dataset.listing("train")


# -------------------------------------------------------------------------------------------------------------- ESC-50
def test_esc50_folds(tmp_path: Path):
    dataset = ESC50(write_esc50(tmp_path, clips_per_fold=2))
    everything = dataset.listing("all")
    assert len(everything) == 30
    assert everything.classes == ("dog", "rooster", "rain")
    assert Counter(everything.numbers["fold"].tolist()) == dict.fromkeys(range(1, 6), 6)
    assert all(clip.path.name == f"{clip.fold}-{clip.path.name.split('-', 1)[1]}" for clip in everything)
    assert all(clip.path.stem.endswith(f"-{clip.label}") for clip in everything)
    for split in ("train", "test"):
        assert dataset.listing(split).fingerprint() == everything.fingerprint()
    for fold in range(1, 6):
        train, test = dataset.listing("train", fold), dataset.listing("test", fold)
        assert set(test.numbers["fold"].tolist()) == {fold}
        assert set(train.numbers["fold"].tolist()) == set(range(1, 6)) - {fold}
        assert len(train) + len(test) == 30


# --------------------------------------------------------------------------------------------------------------- DCASE
def test_esc50_archive_folder(tmp_path: Path):
    write_esc50(tmp_path / "ESC-50-master")
    assert len(ESC50(tmp_path).listing("all")) == 15


def test_dcase_scenes_are_the_names_without_their_numbers(tmp_path: Path):
    dataset = DCASE2014(write_dcase(tmp_path))
    train, test = dataset.listing("train"), dataset.listing("test")
    assert len(train) == len(test) == 8
    assert train.classes == test.classes == ("bus", "park", "tube", "tubestation")
    assert not set(train.names) & set(test.names)
    for clip in train:
        assert train.classes[clip.label] == clip.path.stem.rstrip("0123456789")
    # Archives may be unpacked into folders of their own.
    for name in ("scenes_stereo", "scenes_stereo_testset"):
        (tmp_path / name).rename(tmp_path / "moved")
        (tmp_path / name).mkdir()
        (tmp_path / "moved").rename(tmp_path / name / name)
    assert len(dataset.listing("train")) == len(dataset.listing("test")) == 8
