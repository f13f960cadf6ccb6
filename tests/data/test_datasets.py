"""Test what all data sets share, then the data sets of clips and sounds, on tiny copies of their file layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.datasets.audioset import AudioSet, write_audioset
from common.data.datasets.base import MediaDataset, placeholder, video_id
from common.data.datasets.coco import COCO
from common.data.datasets.coco_cn import COCOCN
from common.data.datasets.conceptual_captions import ConceptualCaptions
from common.data.datasets.dcase import DCASE2014, write_dcase
from common.data.datasets.esc50 import ESC50, write_esc50
from common.data.datasets.hmdb51 import HMDB51, write_hmdb51
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.kinetics import Kinetics400, write_kinetics
from common.data.datasets.localized_narratives import LocalizedNarrativesOpenImages
from common.data.datasets.multi30k import Multi30K
from common.data.datasets.stair_captions import STAIRCaptions
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA
from common.data.datasets.ucf101 import UCF101, write_ucf101
from common.data.datasets.voc import PascalVOC
from common.data.listing import DatasetMissing
from tests.data.image_layouts import (
    write_coco,
    write_coco_cn,
    write_coco_karpathy,
    write_conceptual_captions,
    write_imagenet,
    write_multi30k,
    write_stair,
    write_voc,
)
from tests.data.text_layouts import write_tvc, write_tvqa
from tests.data.writers import WRITERS

ALL = (*WRITERS, COCOCN, LocalizedNarrativesOpenImages)
READ: dict[str, Callable[[Path], Any]] = {
    **{kind.name: lambda root, kind=kind: kind(WRITERS[kind](root)) for kind in WRITERS},
    "coco_cn": lambda root: COCOCN(write_coco_cn(root), write_coco_karpathy(root.parent / "coco")),
    "stair_captions": lambda root: STAIRCaptions(write_stair(root), write_coco_karpathy(root.parent / "coco")),
    # The same data sets in their other layouts.
    "kinetics400 flat": lambda root: Kinetics400(write_kinetics(root, ["tai chi", "abseiling"], 3, flat=True)),
    "audioset partial": lambda root: AudioSet(write_audioset(root, listed=25), trimmed=False),
    "hmdb51 nested": lambda root: HMDB51(write_hmdb51(root, nested=True)),
    "coco bare": lambda root: COCO(write_coco(root, instances=False)),
    "voc beside": lambda root: PascalVOC(write_voc(root, nested=False)),
    "imagenet archive": lambda root: ImageNet(write_imagenet(root / "ILSVRC/Data/CLS-LOC").parents[2]),
    "conceptual_captions headed": lambda root: ConceptualCaptions(write_conceptual_captions(root, headed=True)),
    "multi30k unpacked": lambda root: Multi30K(write_multi30k(root, packed=False)),
    "tvqa flat": lambda root: TVQA(write_tvqa(root, flat=True)),
    "tvc elsewhere": lambda root: TVC(write_tvc(root), write_tvqa(root.parent / "elsewhere/films")),
}
GOLDEN = Path(__file__).parents[1] / "golden" / "datasets.json"


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
    assert status.problems
    assert status.dataset.root == tmp_path


def plain(value: Any) -> Any:
    """Convert a value to JSON types."""
    if dataclasses.is_dataclass(value):
        return [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(own) for name, own in value.items()}
    return [plain(own) for own in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def contents(dataset: Any) -> dict[str, Any]:
    """Return all that a data set reads from its folder."""
    status = dataset.status()
    told: dict[str, Any] = {"title": dataset.full_title, "layout": status.layout, "notes": [*status.notes]}
    told |= {"published classes": dataset.published_classes(), "unit": dataset.unit, "problems": [*status.problems]}
    for split, fold in dataset.parts():
        own: dict[str, Any] = {"published": dataset.published_count(split, fold)}
        told[" ".join(map(str, filter(None, (split, fold))))] = own
        with contextlib.suppress(DatasetMissing, ValueError):
            for language in getattr(dataset, "languages", ()):
                captions = dataset.captions(split, language)
                own[language] = plain([captions.language, captions.keys, captions.captions, captions.groups])
            listing = dataset.listing(split, fold)
            rows = [[name, *plain(clip)[1:-1]] for name, clip in zip(listing.names, listing)]
            own |= {"version": listing.version, "classes": plain(listing.classes), "rows": rows}
            own |= {"missing": [listing.missing, *listing.missing_names], "notes": plain(listing.notes)}
            if hasattr(dataset, "annotations"):
                found = dataset.annotations(split)
                own["annotations"] = {name: plain(value) for name, value in vars(found).items() if name != "read_boxes"}
                own["boxes"] = plain(found.boxes()) if found.tag_names else []
            for method in ("labels", "boxes", "questions", "moments", "dialogs"):
                if hasattr(dataset, method):
                    own[method] = plain(getattr(dataset, method)(split))
    if hasattr(dataset, "subtitles"):
        told["subtitles"] = plain(dict(dataset.subtitles() or {}))
    return told


@pytest.mark.parametrize("name", READ)
def test_everything_that_is_read_is_as_it_was(name: str, tmp_path: Path):
    """Compare with `tests/golden/datasets.json`. If that file lacks the entry, write the entry and fail."""
    golden = json.loads(GOLDEN.read_text())
    text = json.dumps(contents(READ[name](tmp_path / "root"))).replace(str(tmp_path), ".")
    found = {f"{name}: {part}": own for part, own in json.loads(text).items()}
    if f"{name}: title" not in golden:
        lines = (f"{json.dumps(part)}: {json.dumps(own)}" for part, own in (golden | found).items())
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        pytest.fail("written; look at it")
    assert found == {part: own for part, own in golden.items() if part.startswith(f"{name}: ")}


@pytest.mark.parametrize("kind", ALL)
def test_unknown_split_and_fold_name_the_known_ones(kind: type[MediaDataset], tmp_path: Path):
    with pytest.raises(ValueError, match=f"no split 'training'; it has: {kind.splits[0]}"):
        kind(tmp_path).listing("training", 1)
    with pytest.raises(ValueError, match=r"folds 1 to|no folds"):
        kind(tmp_path).listing(kind.splits[0], 7)


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


def test_empty_files_and_broken_links_do_not_count_as_found(tmp_path: Path):
    dataset = UCF101(WRITERS[UCF101](tmp_path / "data"))
    first, *others = [clip.path for clip in dataset.listing("train", 1)]
    first.write_bytes(b"")
    count = len(others) + 1
    note = f"train 1: 1 of {count} clips that were looked at are empty or broken links, such as {first.name}"
    assert note in dataset.status().notes
    for path in others:
        path.unlink()
        path.symlink_to(tmp_path / "nowhere.avi")
    status = dataset.status()
    assert "train 1" not in status.counts
    assert f"UCF-101: train 1: {count} of {count} clips that were looked at are empty" in status.problems[0]


# -------------------------------------------------------------------------------------------------------- Kinetics-400
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
        # If the replacement exists, the original file doesn't count as missing.
        corrupted.path.unlink()
        assert Kinetics400(root).listing("train").missing == 0


def test_kinetics_flat_counts_listed_clips_without_file_and_ignores_unlisted_files(tmp_path: Path):
    root = write_kinetics(tmp_path, flat=True, clips_per_class=3)
    placeholder(root / "train" / "unlistedvid_000000_000010.mp4")
    (root / "train" / "t-000000001_000010_000020.mp4").unlink()
    assert Kinetics400(root).listing("train").missing_names == ("t-000000001_000010_000020",)
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


def test_audioset_with_names_of_classes(tmp_path: Path):
    (write_audioset(tmp_path) / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gargling, loud"\n2,/m/03k3r,"Whip"\n'
    )
    named = AudioSet(tmp_path).listing("unbalanced_train")
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
    assert [published.published_count(split) for split in ("unbalanced_train", "evaluation")] == [100_000, 20_371]
    assert AudioSet(tmp_path, clip_list=chosen).published_count("unbalanced_train") is None
    with pytest.raises(DatasetMissing, match=r"clip_list names .*gone\.txt"):
        AudioSet(tmp_path / "data", clip_list=tmp_path / "gone.txt").listing("train")


# ------------------------------------------------------------------------------------------------------------- UCF-101
def test_ucf101_converted_files(tmp_path: Path):
    folder = write_ucf101(tmp_path) / "UCF-101" / "YoYo"
    (folder / "v_YoYo_g01_c02.avi").rename(folder / "v_YoYo_g01_c02.mp4")
    assert UCF101(tmp_path).listing("validation", 1)[-1].path.suffix == ".mp4"
    with pytest.raises(ValueError, match="fold = 1 to 3"):
        UCF101(tmp_path).listing("train")


# -------------------------------------------------------------------------------------------------------------- ESC-50
def test_esc50_folds(tmp_path: Path):
    dataset = ESC50(write_esc50(tmp_path / "ESC-50-master", clips_per_fold=2))
    everything = dataset.listing("all")
    for split in ("train", "test"):
        assert dataset.listing(split).fingerprint() == everything.fingerprint()
    for fold in range(1, 6):
        train, test = dataset.listing("train", fold), dataset.listing("test", fold)
        assert set(test.numbers["fold"].tolist()) == {fold}
        assert set(train.numbers["fold"].tolist()) == set(range(1, 6)) - {fold}
        assert len(train) + len(test) == len(everything) == 30


# --------------------------------------------------------------------------------------------------------------- DCASE
def test_dcase_in_the_folders_of_its_archives(tmp_path: Path):
    dataset = DCASE2014(write_dcase(tmp_path))
    for name in ("scenes_stereo", "scenes_stereo_testset"):
        (tmp_path / name).rename(tmp_path / "moved")
        (tmp_path / name).mkdir()
        (tmp_path / "moved").rename(tmp_path / name / name)
    assert len(dataset.listing("train")) == len(dataset.listing("test")) == 8
