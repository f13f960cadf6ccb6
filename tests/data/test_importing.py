"""Data of other layouts as a folder with a list: WebDataset's shards, and Hugging Face's data sets on disk."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from common.commands.main import main
from common.data import importing
from common.data.datasets.folder import FolderOfAudio, FolderOfClips, FolderOfImages
from common.data.importing import import_data
from common.errors import StageError


def picture(color: tuple[int, int, int] = (9, 9, 9)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(stream, "png")
    return stream.getvalue()


def shard(path: Path, **members: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


class TestShards:
    def test_images_with_captions_and_tags(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        facts = {"caption": ["a dog", "one dog"], "caption_de": "ein Hund", "tags": ["dog"], "url": "https://x"}
        shard(tmp_path / "in/0.tar", **{
            "a/1.png": picture(), "a/1.json": json.dumps(facts).encode(), "a/2.png": picture((1, 2, 3)),
            "a/2.txt": "two cäts\n".encode(), "b.txt": b"no picture",
        })  # fmt: skip
        shard(tmp_path / "in/1.tar", **{"a/1.png": picture((5, 5, 5)), "a/1.txt": b"another"})
        assert main(["import", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
        told = capsys.readouterr().out
        assert "3 samples" in told
        assert "1 without video, image or sound are passed over, such as 0/b" in told
        dataset = FolderOfImages(tmp_path / "out")
        assert dataset.listing("all").table.names() == ["files/0/a/1.png", "files/0/a/2.png", "files/1/a/1.png"]
        annotations = dataset.annotations("all")
        assert annotations.captions == [("a dog", "one dog"), ("two cäts",), ("another",)]
        assert annotations.tag_names == ("dog",)
        assert list(dataset.captions("all", "de").keys) == ["1"]
        assert (tmp_path / "out/files/0/a/2.png").read_bytes() == picture((1, 2, 3))

    def test_videos_with_sounds_and_classes(self, tmp_path: Path) -> None:
        one = shard(tmp_path / "x.tar", **{"1.mp4": b"v", "1.wav": b"s", "1.cls": b"3", "2.mp4": b"w", "2.cls": b"4"})
        assert import_data(one, tmp_path / "out") == (2, [])
        clips = FolderOfClips(tmp_path / "out").listing("all")
        assert clips.classes == ("3", "4")
        assert [clip.sound and clip.sound.name for clip in clips.clips] == ["1.wav", None]

    @pytest.mark.parametrize(("suffix", "kind"), [(".mp4", FolderOfClips), (".wav", FolderOfAudio)])
    def test_what_lists_of_clips_and_sounds_do_not_know_is_left_out(
        self, tmp_path: Path, suffix: str, kind: type[FolderOfClips]
    ) -> None:
        facts = {"text": "a dog barks", "caption_de": "ein Hund", "tags": ["dog"], "label": "dog", "split": "train2017"}
        members = {f"1{suffix}": b"x", "1.json": json.dumps(facts).encode(), f"2{suffix}": b"y", "2.txt": b"a cat"}
        members["2.cls"] = b"\xef\xbb\xbfcat\r\n"
        import_data(shard(tmp_path / "x.tar", **members), tmp_path / "out")
        assert kind(tmp_path / "out").listing("all").classes == ("cat", "dog")

    def test_a_fact_of_null_is_none(self, tmp_path: Path) -> None:
        facts = json.dumps({"label": None, "caption": None, "caption_de": "ein Hund"}).encode()
        import_data(shard(tmp_path / "x.tar", **{"1.png": picture(), "1.json": facts}), tmp_path / "out")
        assert json.loads((tmp_path / "out/metadata.jsonl").read_text()) == {
            "file_name": "files/x/1.png",
            "caption_de": "ein Hund",
        }
        assert FolderOfImages(tmp_path / "out").listing("all").classes == ()

    def test_what_was_imported_before_is_replaced_by_what_is_new(self, tmp_path: Path) -> None:
        import_data(shard(tmp_path / "x.tar", **{"1.wav": b"dog", "1.cls": b"0"}), tmp_path / "out")
        (tmp_path / "out/metadata.jsonl").unlink()
        import_data(shard(tmp_path / "x.tar", **{"1.wav": b"cat", "1.cls": b"1"}), tmp_path / "out")
        assert (tmp_path / "out/files/x/1.wav").read_bytes() == b"cat"

    def test_names_that_are_not_utf_8(self, tmp_path: Path) -> None:
        members = {
            "\udce4.png": picture(),
            "\udce4.txt": "ein Bär".encode(),
            "b.png": picture(),
            "b.txt": "zwei Bären".encode(),
        }
        import_data(shard(tmp_path / "x.tar", **members), tmp_path / "out")
        found = FolderOfImages(tmp_path / "out").annotations("all")
        assert sorted(found.captions) == [("ein Bär",), ("zwei Bären",)]
        assert "zwei Bären" in (tmp_path / "out/metadata.jsonl").read_text(encoding="utf-8")

    def test_names_stay_in_the_folder(self, tmp_path: Path) -> None:
        import_data(shard(tmp_path / "x.tar", **{"../../../out.png": picture()}), tmp_path / "deep/er/out")
        assert FolderOfImages(tmp_path / "deep/er/out").listing("all").table.names() == ["files/x/out.png"]

    def test_files_of_a_sample_lie_together(self, tmp_path: Path) -> None:
        members = {"a/1.png": picture(), "a/2.png": picture(), "a/1.txt": b"one", "a/2.txt": b"two"}
        one = shard(tmp_path / "x.tar", **members)
        with pytest.raises(StageError, match=r"x\.tar: the files of sample 'a/1' do not lie together: .* sorted by"):
            import_data(one, tmp_path / "out")
        assert not (tmp_path / "out/metadata.jsonl").exists()
        hidden = {"a/._1.png": b"of macOS", "a/1.png": picture(), "a/._1.txt": b"of macOS", "a/1.txt": b"one"}
        assert import_data(shard(one, **hidden), tmp_path / "out") == (1, [])

    # A file takes two blocks: cut inside a file, between two, and inside a header.
    @pytest.mark.parametrize("length", [20_000, 20 * 1024, 20 * 1024 + 100])
    def test_damaged_shards_leave_no_list(self, tmp_path: Path, length: int) -> None:
        whole = shard(tmp_path / "in/0.tar", **{f"{number}.png": picture() for number in range(40)})
        whole.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(StageError, match=r"0\.tar is damaged"):
            import_data(tmp_path / "in", tmp_path / "out")
        assert not (tmp_path / "out/metadata.jsonl").exists()
        shard(whole, **{f"{number}.png": picture() for number in range(40)})
        assert import_data(tmp_path / "in", tmp_path / "out")[0] == 40

    def test_errors_name_the_place(self, tmp_path: Path) -> None:
        with pytest.raises(StageError, match=r"x\.tar: 1\.json: "):
            import_data(shard(tmp_path / "x.tar", **{"1.png": picture(), "1.json": b"{"}), tmp_path / "out")
        with pytest.raises(StageError, match="none of 1 samples holds"):
            import_data(shard(tmp_path / "y.tar", **{"1.txt": b"alone"}), tmp_path / "out")
        with pytest.raises(StageError, match="absent does not exist"):
            import_data(tmp_path / "absent", tmp_path / "out")
        (tmp_path / "empty").mkdir()
        with pytest.raises(StageError, match="is neither a folder of tar shards nor"):
            import_data(tmp_path / "empty", tmp_path / "out")
        (tmp_path / "full").mkdir()
        (tmp_path / "full/metadata.csv").touch()
        with pytest.raises(StageError, match="holds a list already"):
            import_data(tmp_path / "empty", tmp_path / "full")


def test_samples_of_files_that_are_not_known_are_told(tmp_path: Path) -> None:
    archive = shard(tmp_path / "x.tar", **{"0.jp2": b"j", "1.png": picture(), "2.heic": b"h"})
    assert import_data(archive, tmp_path / "out") == (1, ["x/0", "x/2"])


@pytest.mark.parametrize(("kind", "name"), [("image", "x.png"), ("video", "x.mp4"), ("audio", "x.wav")])
def test_what_begins_as_many_formats_do_is_named_by_its_column(kind: str, name: str, tmp_path: Path) -> None:
    assert importing._file_of({"path": None, "bytes": b"RIFF\0\0\0\0????"}, kind, tmp_path)[0] == name


class TestDatasets:
    def test_without_the_package_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        (tmp_path / "dataset_info.json").write_text("{}")
        with pytest.raises(StageError, match=r"`make extra-datasets` in a checkout, else pip install"):
            import_data(tmp_path, tmp_path / "out")

    def test_images_with_classes_and_splits(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        features = datasets.Features({**kinds, "caption": datasets.Value("string")})

        def rows(labels: tuple[int, ...]) -> Iterator[dict[str, object]]:
            for number, label in enumerate(labels):
                image = {"bytes": picture((number, 0, label)), "path": None}
                yield {"image": image, "label": label, "caption": f"number {number}"}

        def part(*labels: int) -> object:
            options = {"features": features, "cache_dir": str(tmp_path / "cache"), "gen_kwargs": {"labels": labels}}
            return datasets.Dataset.from_generator(rows, **options)

        whole = datasets.DatasetDict({"train": part(0, 1, 1), "validation": part(1)})
        whole.save_to_disk(str(tmp_path / "in"))
        assert import_data(tmp_path / "in", tmp_path / "out") == (4, [])
        dataset = FolderOfImages(tmp_path / "out")
        train = dataset.listing("train")
        assert train.classes == ("cat", "dog")
        assert train.labels.tolist() == [0, 1, 1]
        assert len(dataset.listing("val")) == 1
        assert dataset.annotations("train").captions == [("number 0",), ("number 1",), ("number 2",)]
        assert train[1].path.read_bytes() == picture((1, 0, 1))
        for parts, told in (
            ({"train": part(0, 1), "extra": part(1)}, "the split 'extra' is none of"),
            ({"train": part(0, 1), "test": part(-1, -1)}, "2 of 4 rows have no class"),
        ):
            datasets.DatasetDict(parts).save_to_disk(str(tmp_path / told))
            with pytest.raises(StageError, match=told):
                import_data(tmp_path / told, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
