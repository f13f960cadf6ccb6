"""Test users' folders: layouts, lists, splits and folds, and error messages."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.data.clips import AudioVisualClips, SoundWindows
from common.data.datasets.folder import FolderOfAudio, FolderOfClips, FolderOfImages
from common.data.listing import DatasetError, DatasetMissing, Listing
from common.data.sequences import Texts
from common.data.transforms import AudioInput, VideoInput
from tests.data.media_factory import listing_of, write_video, write_wav


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def names_of(dataset: FolderOfClips | FolderOfAudio | FolderOfImages, split: str, fold: int | None = None) -> list[str]:
    return dataset.listing(split, fold).names


class TestClassFolders:
    def test_each_class_is_dealt_out_to_five_folds(self, tmp_path: Path) -> None:
        # The folds depend on hashes of the file names, so the first fold is the same on every machine.
        names = [f"cat/{number}.wav" for number in range(7)]
        assert names_of(FolderOfAudio(touch(tmp_path / "sounds", *names)), "test") == ["cat/1.wav", "cat/3.wav"]
        tmp_path = tmp_path / "clips"
        touch(tmp_path, *(f"{kind}/{number}.mp4" for kind in ("cat", "dog") for number in range(10)))
        dataset = FolderOfClips(tmp_path)
        everything = dataset.listing("all")
        assert everything.classes == ("cat", "dog")
        for label in (0, 1):
            folds = everything.numbers["fold"][everything.labels == label]
            assert np.bincount(folds).tolist() == [0, 2, 2, 2, 2, 2]
        train, test = names_of(dataset, "train"), names_of(dataset, "test")
        assert len(train) == 16
        assert len(test) == 4
        assert set(train) | set(test) == set(everything.names)
        assert names_of(dataset, "validation") == test == names_of(dataset, "test", 1)
        assert not set(names_of(dataset, "test", 2)) & set(test)
        # Recipes use these names for the same splits.
        assert names_of(dataset, "unbalanced_train") == names_of(dataset, "trainval") == train
        assert names_of(dataset, "evaluation") == test

    def test_folders_of_splits(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/cat/a.mp4", "train/dog/b.mp4", "val/cat/c.mp4")
        dataset = FolderOfClips(tmp_path)
        assert names_of(dataset, "train") == ["train/cat/a.mp4", "train/dog/b.mp4"]
        assert names_of(dataset, "test") == names_of(dataset, "test", 1) == ["val/cat/c.mp4"]
        assert dataset.listing("test").classes == ("cat", "dog")
        with pytest.raises(ValueError, match="no fold 2"):
            dataset.listing("test", 2)

    def test_train_alone_keeps_a_fold_back(self, tmp_path: Path) -> None:
        dataset = FolderOfImages(touch(tmp_path, *(f"train/cat/{number}.png" for number in range(5))))
        assert len(names_of(dataset, "train")) == 4
        assert len(names_of(dataset, "val")) == 1

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        dataset = FolderOfImages(touch(tmp_path, "train/a.png", "car/b.png", "bus/c.png"))
        assert dataset.listing("all").classes == ("bus", "car", "train")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("train/cat/a.png", "test/cat/b.png", "extra/c.png"), "test, train and also extra"),
            (("train/cat/a.png", "test/cat/b.png", "c.png"), r"c\.png: no label"),
            (("train/a.png", "test/b.png", "c.png"), r"c\.png: no split"),
            (("cat/a.png", "loose.png"), r"loose\.png: no label"),
            (("train/a.png", "train/metadata.jsonl"), r"train/metadata\.jsonl is not read: list .* in .*metadata\.csv"),
        ],
    )
    def test_contradicting_folders_are_refused(self, tmp_path: Path, names: tuple[str, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            FolderOfImages(touch(tmp_path, *names)).listing("train")

    def test_files_alone_have_no_class(self, tmp_path: Path) -> None:
        listing = FolderOfClips(touch(tmp_path, "a.mp4", "b.MKV", "c.mov")).listing("all")
        assert listing.classes == ()
        assert listing.labels.tolist() == [-1, -1, -1]
        assert listing.layout == "files without classes"

    @pytest.mark.parametrize("kind", [FolderOfClips, FolderOfAudio, FolderOfImages])
    def test_empty_and_missing_folders(self, tmp_path: Path, kind: type[FolderOfClips]) -> None:
        with pytest.raises(DatasetMissing, match="it is empty"):
            kind(tmp_path).listing("train")
        with pytest.raises(DatasetMissing, match=r"nothing at .*absent"):
            kind(tmp_path / "absent").listing("train")
        touch(tmp_path, "a.xyz", "b.xyz")
        with pytest.raises(DatasetMissing, match=r"it holds 2 x \.xyz"):
            kind(tmp_path).listing("train")


class TestSounds:
    def test_the_paired_sound_is_what_is_heard(self, tmp_path: Path) -> None:
        write_video(tmp_path / "a.mp4", with_audio=False)
        write_wav(tmp_path / "a.wav", frequency=2000.0)
        write_video(tmp_path / "b.mp4", with_audio=False)
        listing = FolderOfClips(listed(tmp_path, "file_name,sound\na.mp4,a.wav\nb.mp4,\n")).listing("all")
        audio = AudioInput(sample_rate=8000, duration=0.5, fft=256, frames_per_second=32)
        video = VideoInput(fps=8.0, duration=0.5, crop=16, resize=16)
        options = {"video_duration": 0.5, "video_fps": 8.0, "training": False}
        clips = AudioVisualClips(listing, video.transform(False), audio.transform(False), **options)
        # The tone of 2 kHz is in bin 32, because 64 bins cover 4 kHz.
        assert int(clips[0]["audio"][0, 1:].mean(0).argmax()) == 32
        assert clips[0]["video"].shape == (3, 4, 16, 16)
        # An item without a sound track or a sound file is skipped.
        lenient = AudioVisualClips(listing, None, audio.transform(False), max_skipped_fraction=0.5, **options)
        assert int(lenient[1]["index"]) == 0
        windows = SoundWindows(listing.subset([0]), audio.transform(False), training=False, windows=2)
        assert windows[0]["audio"].shape[:2] == (2, 1)

    def test_sounds_are_part_of_the_fingerprint_and_of_the_kept_index(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.mp4", "a.wav", "b.mp4")
        listing = FolderOfClips(listed(tmp_path, "file_name,sound\na.mp4,a.wav\nb.mp4,\n")).listing("all")
        plain = replace(listing, sounds=Texts(()))
        assert plain.fingerprint() != listing.fingerprint()
        assert listing_of(tmp_path, listing).fingerprint() == listing.fingerprint()
        assert Listing.of_columns(listing.columns()).fingerprint() == listing.fingerprint()


def listed(root: Path, text: str) -> Path:
    (root / "metadata.csv").write_text(text, encoding="utf-8")
    return root


class TestLists:
    def test_pairs_of_picture_and_sound(self, tmp_path: Path) -> None:
        touch(tmp_path, "v/1.mp4", "s/1.wav", "v/2.mp4")
        listed(
            tmp_path,
            "\ufefffile_name,sound,label,split,start,end\n"
            "v/1.mp4,s/1.wav,dog,train,0,1.5\n"
            "v/1.mp4,s/1.wav,dog,train,1.5,\n"
            "v/2.mp4,,cat,val,,\n",
        )
        dataset = FolderOfClips(tmp_path)
        first, second = dataset.listing("train")
        assert (first.sound, first.start, first.end) == (tmp_path / "s/1.wav", 0.0, 1.5)
        assert (second.start, second.end) == (1.5, None)
        (other,) = dataset.listing("test")
        assert (other.sound, other.start, other.label) == (None, None, 0)

    def test_parts_of_several_classes_stay_in_one_fold(self, tmp_path: Path) -> None:
        touch(tmp_path, *(f"{number}.wav" for number in range(20)))
        rows = [f"{number}.wav,speech,0,1" for number in range(20)]
        rows += [f"{number}.wav,music,1,2" for number in range(0, 20, 2)]
        dataset = FolderOfAudio(listed(tmp_path, "\n".join(["file_name,label,start,end", *rows])))
        train, test = (set(dataset.listing(split).names) for split in ("train", "test"))
        assert not train & test
        assert len(train) + len(test) == 20
        assert {name for name in test if int(Path(name).stem) % 2 == 0}  # the test split needs both kinds

    def test_names_are_found_however_they_are_spelt(self, tmp_path: Path) -> None:
        touch(tmp_path, unicodedata.normalize("NFD", "café.png"))
        listed(tmp_path, f"file_name\n{unicodedata.normalize('NFC', 'café.png')}\n")
        assert names_of(FolderOfImages(tmp_path), "all") == [unicodedata.normalize("NFD", "café.png")]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("file_name,label\na.mp4,x\nlost.mp4,x\n", r"metadata\.csv, line 3: file 'lost\.mp4' does not exist"),
            ("file_name,split\na.mp4,train\na.mp4,test\n", r"a\.mp4 is listed twice"),
            ("file_name,lable\na.mp4,dog\n", r"metadata\.csv, line 1: unknown column 'lable'"),
            ("file_name,start\na.mp4,soon\n", "line 2: .*'soon'"),
            ("file_name,start,end\na.mp4,3,2\n", "line 2: start 3 and end 2"),
            ("file_name,start\na.mp4,-3\n", "line 2: start -3"),
            ("file_name,split\na.mp4,train\nb.mp4,\n", r"b\.mp4: no split"),
            ("file_name,split\na.mp4,tarin\n", "line 2: split 'tarin'"),
            ("file_name,label\na.mp4,x\nb.mp4,\n", r"b\.mp4: no label"),
            ('file_name,label\na.mp4,"Stop" sign\nb.mp4,x\n', r"metadata\.csv, line 2: "),
            ("file_name,label\na.mp4,x\nb.mp4,caf\u00e9\n".encode("latin-1"), r"metadata\.csv, line 3: .*utf-8"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path: Path, text: str | bytes, message: str) -> None:
        touch(tmp_path, "a.mp4", "b.mp4", "notes.txt")
        (tmp_path / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DatasetError, match=message):
            FolderOfClips(tmp_path).listing("all")

    def test_quotes_may_hold_commas_lines_and_quotes(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.png", "b.png")
        text = 'file_name, caption\na.png, "a ""Stop"" sign,\nred"\n\nb.png,5" wide\n'
        assert FolderOfImages(listed(tmp_path, text)).annotations("all").captions == [
            ('a "Stop" sign, red',),
            ('5" wide',),
        ]


class TestImages:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        touch(tmp_path, "a.png", "b.jpg", "c.webp")
        rows = [
            "file_name,caption,caption_en,caption_de,caption_ja,tags",
            "a.png,,a dog,ein Hund,,dog",
            "b.jpg,two cats,,,猫,cat; two",
            "c.webp,nothing,,,,",
            "a.png,,one  dog,,,",
            "a.png,again a dog,,,,dog",
        ]
        return listed(tmp_path, "\n".join(rows))

    def test_captions_and_tags_are_aligned_with_the_listing(self, root: Path) -> None:
        dataset = FolderOfImages(root)
        listing = dataset.listing("all")
        annotations = dataset.annotations("all", listing)
        assert annotations.captions == [("again a dog", "a dog", "one dog"), ("two cats",), ("nothing",)]
        assert annotations.caption_ids == [(0, 1, 2), (3,), (4,)]
        assert annotations.tag_names == ("cat", "dog", "two")
        assert annotations.tags.tolist() == [[False, True, False], [True, False, True], [False, False, False]]
        part = dataset.annotations("all", listing.subset([2, 0]))
        assert part.captions == [("nothing",), ("again a dog", "a dog", "one dog")]
        assert part.image_ids.tolist() == [2, 0]
        assert part.caption_ids == [(4,), (0, 1, 2)]

    def test_languages(self, root: Path) -> None:
        dataset = FolderOfImages(root)
        assert list(dataset.captions("all", "de").keys) == ["a"]
        assert dataset.captions("all", "ja").captions == [("猫",)]
        assert len(dataset.captions("all", "en")) == 3
        assert FolderOfImages(root, language="de").annotations("all").captions[0] == ("again a dog", "ein Hund")
        with pytest.raises(ValueError, match=r"no captions in 'fr'; it has de, en, ja: .*caption_fr"):
            dataset.captions("all", "fr")

    def test_same_stems_are_refused_where_they_would_share_regions(self, tmp_path: Path) -> None:
        touch(tmp_path, "x/a.png", "y/a.jpg")
        listed(tmp_path, "file_name,caption\nx/a.png,one\ny/a.jpg,two\n")
        dataset = FolderOfImages(tmp_path)
        assert len(dataset.listing("all")) == 2
        with pytest.raises(ValueError, match=r"x/a\.png and y/a\.jpg would both be called 'a'"):
            dataset.captions("all", "en")

    def test_without_a_list_the_class_is_the_tag(self, tmp_path: Path) -> None:
        annotations = FolderOfImages(touch(tmp_path, "cat/a.png", "dog/b.png")).annotations("all")
        assert annotations.tag_names == ("cat", "dog")
        assert annotations.tags.tolist() == [[True, False], [False, True]]
        assert annotations.captions == [(), ()]


def test_the_summary_counts_files_and_classes_and_names_what_is_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.mkv", "x/b.mkv", "notes.txt")
    first, ignored = FolderOfClips(tmp_path).summary().splitlines()
    assert first == f"{tmp_path}: 2 clips of 1 class (class folders)"
    assert ignored == "  1 other files are ignored: 1 x .txt"
    assert (
        FolderOfImages(touch(tmp_path / "y", "a.png"))
        .summary()
        .endswith("1 images without classes (files without classes)")
    )
