"""Data sets whose media files lie in tar shards: written, read in any order, and trained on as from their folder."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
import webdataset
from lightning.pytorch import Callback
from PIL import Image

from common.data import shards
from common.data.datasets.audioset import AudioSet
from common.data.datasets.base import MediaDataset
from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.conceptual_captions import ConceptualCaptions
from common.data.datasets.dcase import DCASE2014
from common.data.datasets.esc50 import ESC50
from common.data.datasets.hmdb51 import HMDB51
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.kinetics import Kinetics400
from common.data.datasets.multi30k import Multi30K
from common.data.datasets.tvqa import TVQA
from common.data.datasets.ucf101 import UCF101
from common.data.datasets.voc import PascalVOC
from common.data.frames import open_media
from common.data.images import ImageCache, ImageError, read_image
from common.data.listing import DatasetMissing
from common.data.media import MediaError, MediaFile
from common.data.prepare import check_samples
from common.data.shard_writing import ShardReport, file_name, member_name, write_shards
from common.data.worlds.clip_layouts import (
    write_audioset,
    write_dcase,
    write_esc50,
    write_hmdb51,
    write_kinetics,
    write_ucf101,
)
from common.stages.cli import build
from tests.data.image_layouts import write_coco, write_image, write_imagenet, write_karpathy, write_voc
from tests.data.language_layouts import write_conceptual_captions, write_multi30k
from tests.data.media_factory import write_video, write_wav
from tests.data.text_layouts import write_tvqa
from tests.stages import request


def write_sound(path: Path) -> None:
    write_wav(path, seconds=0.2, rate=8_000)


def write_clip(path: Path) -> None:
    """A clip that differs from every other one, and that nothing is found in but by decoding."""
    frames = np.random.default_rng(len(str(path)) + sum(path.name.encode())).integers(0, 256, (4, 16, 16, 3), np.uint8)
    write_video(path, 0.5, fps=8, size=(16, 16), frames=frames, with_audio=False)


LAYOUTS = {
    "audioset": (
        AudioSet,
        lambda root: write_audioset(root, naming="{video}_{start}.000_{end}.000.mp4", write=write_clip),
    ),
    "coco": (COCO, write_coco),
    "coco_karpathy": (COCOKarpathy, write_karpathy),
    "conceptual_captions": (ConceptualCaptions, write_conceptual_captions),
    "dcase2014": (DCASE2014, lambda root: write_dcase(root, write=write_sound)),
    "dcase2014 by lists": (DCASE2014, lambda root: write_dcase(root, lists=True, write=write_sound)),
    "esc50": (ESC50, lambda root: write_esc50(root, write=write_sound)),
    "hmdb51": (HMDB51, lambda root: write_hmdb51(root, write=write_clip)),
    "imagenet": (ImageNet, write_imagenet),
    "kinetics400": (Kinetics400, lambda root: write_kinetics(root, write=write_clip)),
    "multi30k": (Multi30K, write_multi30k),
    "tvqa": (TVQA, write_tvqa),
    "ucf101": (UCF101, lambda root: write_ucf101(root, write=write_clip)),
    "voc": (PascalVOC, write_voc),
}


def kinetics(root: Path, **options) -> Path:
    return write_kinetics(root, write=write_clip, **options)


def written(root: Path, target: Path, size: int = 8_000) -> ShardReport:
    return write_shards(root, target, size)


def parts(dataset: MediaDataset) -> list:
    found = []
    for split, fold in dataset.parts():
        try:
            found.append(dataset.listing(split, fold))
        except DatasetMissing:
            found.append(None)
    return found


def content(path: Path) -> bytes:
    source = shards.source(path)
    if isinstance(source, str):
        return Path(source).read_bytes()
    with source:
        return source.read()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sharded_folder_has_the_items_of_the_folder(tmp_path: Path, name: str):
    make, write = LAYOUTS[name]
    root, target = tmp_path / "plain", tmp_path / "sharded"
    write(root)
    report = written(root, target)
    assert report.files > 0
    # Nothing but annotations lies beside the shards.
    assert not [path for path in target.rglob("*") if path.suffix in (".jpg", ".mp4", ".avi", ".wav")]
    before, after = parts(make(root)), parts(make(target))
    assert any(listing is not None for listing in before)
    for own, other in zip(before, after):
        assert (own is None) == (other is None)
        if own is None or other is None:
            continue
        assert other.fingerprint() == own.fingerprint()
        assert (other.layout, other.missing, other.notes) == (own.layout, own.missing, own.notes)
        for mine, theirs in zip(own.clips, other.clips):
            if mine.path.is_file():
                assert content(theirs.path) == content(mine.path)
    check = check_samples(make(target))
    assert check.broken == check_samples(make(root)).broken
    assert check.checked


def test_pictures_sound_and_frames_are_the_same(tmp_path: Path):
    root, target = tmp_path / "plain", tmp_path / "sharded"
    write_image(root / "a/picture.jpg", 3)
    write_video(root / "a/clip.mp4", 2.0, fps=8, size=(32, 24), with_audio=True)
    for number in (1, 2, 4):
        write_image(root / "frames" / f"{number:05d}.jpg", number)
    written(root, target)
    assert np.array_equal(read_image(target / "a/picture.jpg"), read_image(root / "a/picture.jpg"))
    assert np.array_equal(ImageCache(10**6).get(target / "a/picture.jpg"), read_image(root / "a/picture.jpg"))
    read = []
    for path in (root, target):
        with MediaFile(path / "a/clip.mp4") as media, open_media(path / "frames") as frames:
            info = media.info
            late = media.read_video(1.0, 0.5, 8.0)[0], media.read_audio(1.2, 0.4, 8_000)
            # The second look at the beginning opens the file again.
            early = media.read_video(0.0, 0.5, 8.0)[0]
            read.append((info, *late, early, frames.read_video(0.0, 1.0, 3.0)[0]))
    assert read[0][0] == read[1][0]
    for mine, theirs in zip(read[0][1:], read[1][1:]):
        assert torch.equal(mine, theirs)


def test_webdataset_reads_the_shards(tmp_path: Path):
    root, target = tmp_path / "plain", tmp_path / "sharded"
    names = ["a/x_0.000_10.000.jpg", "a/50%.jpg", "b.c/y.JPG", "b.c/z.png"]
    for number, name in enumerate(names):
        write_image(root / name, number)
    assert written(root, target, 3_000).written > 1
    urls = [str(path) for path in sorted((target / "webdataset").glob("*.tar"))]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        (kind,) = (key for key in sample if not key.startswith("__"))
        assert kind in ("jpg", "png")
        found[sample["__key__"]] = sample[kind]
    assert sorted(found) == ["a/50%25", "a/x_0%2E000_10%2E000", "b.c/y", "b.c/z"]
    assert found["a/x_0%2E000_10%2E000"] == (root / names[0]).read_bytes()
    for name in [*names, "a%2Eb.c%25.x.mp4", "%.%.jpg", "plain.wav"]:
        assert file_name(member_name(name)) == name
        assert PurePosixPath(member_name(name)).name.count(".") == 1
    sizes = [Image.open(target_file).size for name in names if (target_file := shards.source(target / name))]
    assert sizes == [Image.open(root / name).size for name in names]


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, target = kinetics(tmp_path / "plain", clips_per_class=3), tmp_path / "sharded"
    whole = written(root, tmp_path / "at once")
    assert whole.written > 2

    def killed(path: Path) -> bytes | str:
        if path.name.endswith(f"{last}.mp4"):
            raise KeyboardInterrupt
        return read(path)

    from common.data import shard_writing

    read = shard_writing._read
    last = sorted(path.stem for path in (root / "val").rglob("*.mp4"))[-1]
    monkeypatch.setattr(shard_writing, "_read", killed)
    with pytest.raises(KeyboardInterrupt):
        written(root, target)
    # Half made shards are not used, and nobody mistakes the folder for an empty one.
    with pytest.raises(DatasetMissing, match="shards are not complete"):
        Kinetics400(target).listing("train")
    assert not list(target.rglob("*.partial"))
    monkeypatch.setattr(shard_writing, "_read", read)
    report = written(root, target)
    assert report.kept == whole.written - 1
    assert report.written == 1
    for path in (tmp_path / "at once/webdataset").iterdir():
        assert (target / "webdataset" / path.name).read_bytes() == path.read_bytes()
    # All is there: nothing is written. A file that changed has its own shard written.
    assert written(root, target).written == 0
    changed = next(iter(sorted((root / "train").rglob("*.mp4"))))
    changed.write_bytes(changed.read_bytes())
    os.utime(changed, (1, 1))
    assert written(root, target).written == 1
    # Larger shards: the old ones go.
    assert written(root, target, 10**9).written == 1
    assert [path.name for path in (target / "webdataset").glob("*.tar")] == ["000000.tar"]
    assert Kinetics400(target).listing("train").fingerprint() == Kinetics400(root).listing("train").fingerprint()


def test_a_broken_file_is_passed_over_and_keeps_its_place(tmp_path: Path):
    root, target = kinetics(tmp_path / "plain"), tmp_path / "sharded"
    damaged = sorted((root / "train").rglob("*.mp4"))[1]
    damaged.write_bytes(b"no video")
    name = damaged.relative_to(root).as_posix()
    report = written(root, target)
    assert list(report.broken) == [name]
    assert (target / "webdataset/broken.txt").read_text().startswith(f"{name}\t")
    assert Kinetics400(target).listing("train").fingerprint() == Kinetics400(root).listing("train").fingerprint()
    errors = []
    for path in (root, target):
        with pytest.raises(MediaError) as caught:
            MediaFile(path / name)
        errors.append(str(caught.value).removeprefix(str(path)))
    assert errors[0] == errors[1]
    # The next run looks again, and finds it repaired.
    assert written(root, target).written == 0
    write_clip(damaged)
    report = written(root, target)
    assert (report.written, report.broken) == (1, {})
    MediaFile(target / name).close()


def test_a_broken_picture_says_the_same(tmp_path: Path):
    root, target = tmp_path / "plain", tmp_path / "sharded"
    write_image(root / "x/good.jpg")
    (root / "x/bad.jpg").write_bytes(b"")
    written(root, target)
    errors = []
    for path in (root, target):
        with pytest.raises(ImageError) as caught:
            read_image(path / "x/bad.jpg")
        errors.append(str(caught.value).removeprefix(str(path)))
    assert errors[0] == errors[1]
    with pytest.raises(ImageError, match="No such file"):
        read_image(target / "x/absent.jpg")


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damage_to_a_shard_is_named_and_stops(tmp_path: Path, damage: str):
    root, target = kinetics(tmp_path / "plain"), tmp_path / "sharded"
    written(root, target)
    listing = Kinetics400(target).listing("train")
    shard = target / "webdataset/000001.tar"
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 700)
    else:
        shard.unlink()
    # Neither a run that begins, nor one that has its listing already, takes that for a broken clip.
    shards._read_index.cache_clear()
    shards._open_shards.clear()
    with pytest.raises(shards.ShardError, match=r"000001\.tar.*--shards"):
        Kinetics400(target).listing("train")
    with pytest.raises(shards.ShardError, match=r"000001\.tar"):
        _read_all([clip.path for clip in listing.clips])
    status = Kinetics400(target).status()
    assert not status.present
    assert "000001.tar" in status.problem
    # What is missing is written anew.
    assert written(root, target).written == 1
    assert Kinetics400(target).listing("train").fingerprint() == listing.fingerprint()


def test_a_damaged_index_is_named(tmp_path: Path):
    root, target = kinetics(tmp_path / "plain"), tmp_path / "sharded"
    written(root, target)
    (target / "webdataset/index.npz").write_bytes(b"PK\x03\x04 half an index")
    with pytest.raises(shards.ShardError, match=r"index\.npz.*damaged"):
        Kinetics400(target).listing("train")
    assert written(root, target).written == 0
    assert len(Kinetics400(target).listing("train"))


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("shards", lambda c: np.array(["../../secret.tar", *c[1:]])),
        ("shards", lambda c: np.array(["/etc/passwd", *c[1:]])),
        ("shards", lambda c: np.array(["..", *c[1:]])),
        ("shards", lambda c: c[:-1]),
        ("shard_bytes", lambda c: c[:-1]),
        ("shard", lambda c: c + 100),
        ("shard", lambda c: c - 100),
        ("shard", lambda c: c[:-1]),
        ("offset", lambda c: c - 10**9),
        ("offset", lambda c: np.full_like(c, 2**63 - 1)),
        ("size", lambda c: -c),
        ("size", lambda c: np.full_like(c, 2**63 - 1)),
        ("size", lambda c: np.append(c, 1)),
        ("name_ends", lambda c: c[::-1]),
        ("name_ends", lambda c: c + 1),
        ("folder_rows", lambda c: c[:-1]),
        ("folder_rows", lambda c: c - 1),
        ("reasons", lambda c: np.frombuffer(b"[1]", dtype=np.uint8)),
    ],
)
def test_an_index_leads_nowhere_but_into_its_shards(tmp_path: Path, column: str, change):
    """It may come with shards of a stranger."""
    (tmp_path / "secret.tar").write_bytes(b"secret" * 10_000)
    target = tmp_path / "sharded"
    written(write_imagenet(tmp_path / "plain"), target)
    path = target / "webdataset/index.npz"
    with np.load(path) as content:
        columns = dict(content)
    np.savez(path, **{**columns, column: change(columns[column])})
    with pytest.raises(shards.ShardError, match=r"index\.npz"):
        ImageNet(target).listing("train")


def _read_all(paths: list[Path]) -> list[bytes]:
    return [content(path) for path in paths]


def test_processes_have_shards_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, target = kinetics(tmp_path / "plain", clips_per_class=3), tmp_path / "sharded"
    written(root, target, 3_000)
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    paths = [clip.path for clip in Kinetics400(target).listing("train").clips]
    expected = _read_all(paths)
    assert len(shards._open_shards) == 2
    first = shards.source(paths[0])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(_read_all, [paths, paths[::-1]])
    assert found == [expected, expected[::-1]]
    # A file that is being read keeps its shard open, however many others were opened since.
    assert not isinstance(first, str)
    with first:
        assert first.read() == expected[0]


def test_links_and_empty_folders_are_kept(tmp_path: Path):
    root, target, elsewhere = write_coco(tmp_path / "plain"), tmp_path / "sharded", tmp_path / "disk"
    # As many lay COCO out: one name for the other, and the images on another disk.
    (root / "val2017").rename(elsewhere)
    (root / "val2017").symlink_to(elsewhere)
    (root / "images").mkdir()
    (root / "images/train2017").symlink_to("../train2017")
    (root / "images/up").symlink_to("..")
    (root / "empty/folder").mkdir(parents=True)
    (root / "train2017/gone.jpg").symlink_to("nowhere.jpg")
    report = written(root, target)
    assert list(report.broken) == ["train2017/gone.jpg"]
    assert (target / "empty/folder").is_dir()
    assert not (target / "val2017").is_symlink()
    for split in ("train", "val"):
        listing = COCO(target).listing(split)
        assert listing.fingerprint() == COCO(root).listing(split).fingerprint()
        assert [content(clip.path) for clip in listing.clips] == [
            content(clip.path) for clip in COCO(root).listing(split).clips
        ]
    name = COCO(root).listing("train")[0].path.name
    assert content(target / "images/train2017" / name) == content(root / "train2017" / name)
    assert shards.names_in(target / "images/train2017") == shards.names_in(target / "train2017")


def test_folders_that_cannot_be_sharded(tmp_path: Path):
    root, target = kinetics(tmp_path / "plain"), tmp_path / "sharded"
    with pytest.raises(ValueError, match="must not lie in each other"):
        written(root, root / "shards")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        written(tmp_path / "none", target)
    (root / "notes.zip").write_bytes(b"PK")
    assert written(root, target).archives == ("notes.zip",)
    with pytest.raises(ValueError, match="in shards already"):
        written(target, tmp_path / "again")


# ---------------------------------------------------------------------------------------------------- training
def write_audible(path: Path) -> None:
    frames = np.random.default_rng(sum(path.name.encode())).integers(0, 256, (20, 24, 24, 3), np.uint8)
    write_video(path, 2.5, fps=8, size=(24, 24), frames=frames, audio_rate=8_000)


class Losses(Callback):
    """The loss and the items of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, list[int]]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        items = batch["index"].tolist() if "index" in batch else batch["image_id"].tolist()
        self.steps.append((outputs["loss"].item(), items))


def trained(name: str, root: Path, folder: Path) -> tuple[list, dict, dict]:
    """Losses and items step by step, weights, and what a record says of the data of a stage that reads a folder."""
    whole = {} if name.startswith("mct") else {"common_seconds": None}  # also clips of less than three seconds
    dataset = {"init_args": {"root": str(root), **whole}}
    own = {"world": None, "dataset": dataset, "cache_bytes": 0, "num_workers": 2}
    data = {"init_args": {**own, "max_skipped_fraction": 0.2}}
    stage = request(name, folder, layer={"trainer": {"max_epochs": 2, "callbacks": None}, "data": data})
    run = stage.configuration()
    losses = Losses()
    arguments = {"logger": False, "enable_checkpointing": False, "callbacks": [losses]}
    cli = build(run, run.with_placeholders(DATA=str(folder), RUN=str(folder)), arguments)
    cli.trainer.fit(cli.model, cli.datamodule)
    return losses.steps, cli.model.state_dict(), cli.datamodule.describe()


@pytest.mark.parametrize("name", ["avid_cma/avid", "mct/mct"])
def test_training_from_shards_is_the_same_to_the_bit(tmp_path: Path, name: str):
    root, target = tmp_path / "plain", tmp_path / "sharded"
    if name == "mct/mct":
        write_coco(root, train=32, val=8)
    else:
        write_kinetics(root, clips_per_class=8, write=write_audible)
    # One that cannot be read is replaced by its neighbour, in both.
    files = sorted(path for path in root.glob("train*/**/*") if path.is_file())
    files[3].write_bytes(b"damaged")
    assert write_shards(root, target, 10_000 if name == "mct/mct" else 50_000).written > 1
    own, others = trained(name, root, tmp_path / "own"), trained(name, target, tmp_path / "others")
    assert len(own[0]) == 4
    assert others[0] == own[0]
    assert own[1].keys() == others[1].keys()
    assert all(torch.equal(value, others[1][key]) for key, value in own[1].items() if isinstance(value, torch.Tensor))
    assert others[2] == own[2]
    assert any(described["skipped"] == 1 for described in own[2].values())
