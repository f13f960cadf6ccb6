"""Test the protocols' data modules: held-out samples, labels, statistics of sounds, and synthetic batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from common.data.datasets.coco import COCO
from common.data.datasets.esc50 import ESC50
from common.data.datasets.folder import FolderOfAudio
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.ucf101 import UCF101
from common.data.datasets.voc import PascalVOC
from common.data.image_transforms import ImageTransform
from common.data.listing import Clip
from common.data.transforms import AudioInput, VideoInput
from common.data.worlds.audiovisual import AudioVisualWorld
from common.protocols import data as protocol_data
from common.protocols.data import ClassificationData, MultiLabelData, SoundClassificationData, VideoClassificationData
from common.training.examples import RandomTensors
from tests.data.image_layouts import write_coco, write_imagenet, write_voc
from tests.data.media_factory import listing_of, write_wav
from tests.protocols.parts import attached

SMALL = ImageTransform(crop=8, resize=8)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_clips_that_come_as_bytes_get_the_precision_of_the_weights(
    precision: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    data: Any = VideoClassificationData(UCF101(tmp_path))
    data.trainer = pl.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    video = torch.randint(256, (2, 3, 3, 4, 8, 8), dtype=torch.uint8)
    given = data.on_after_batch_transfer({"video": video, "index": torch.arange(2)}, 0)
    assert given["video"].dtype == dtype
    assert given["index"].dtype == torch.int64


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.2, 6)])
def test_held_back_images_are_evenly_spaced_and_never_trained_on(tmp_path: Path, share: float, kept: int) -> None:
    write_imagenet(tmp_path, train=10, val=2)
    options: dict[str, Any] = {"image": SMALL, "batch_size": 5, "num_workers": 0, "test_batch_size": 4}
    data = attached(ClassificationData(ImageNet(tmp_path), held_out_fraction=share, **options))
    trained = {clip.path for clip in data.listing}
    held = {clip.path for clip in data.held_out_listing}
    assert len(held) == kept
    assert not trained & held
    assert len(trained | held) == 30
    per_class = np.bincount(data.held_out_listing.labels, minlength=3)
    assert per_class.tolist() == [kept // 3] * 3
    assert data.num_classes == 3
    loaders = data.test_dataloader()
    loaders = loaders if share else [loaders]
    assert [len(loader.dataset) for loader in loaders] == ([kept, 6] if share else [6])
    assert not any(loader.dataset.training for loader in loaders)
    assert data.train_dataloader().dataset.training
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (5, 3, 8, 8)
    assert batch["label"].dtype == torch.int64


@pytest.mark.parametrize("fit", [True, False])
def test_labels_of_voc(tmp_path: Path, fit: bool) -> None:
    write_voc(tmp_path)
    dataset = PascalVOC(tmp_path, years=("2007",))
    data = attached(MultiLabelData(dataset, fit=fit, image=SMALL, batch_size=2, num_workers=0))
    assert data.num_classes == 3
    assert list(data.class_names) == ["aeroplane", "bicycle", "train"]
    loaders = data.test_dataloader()
    loaders = [loaders] if fit else loaders
    assert not any(loader.dataset.training for loader in loaders)
    if fit:
        assert len(loaders[0].dataset) == 3
        training = data.train_dataloader().dataset
        assert (len(training), training.training) == (5, True)
        return
    assert [len(loader.dataset) for loader in loaders] == [5, 3]
    for loader, split in zip(loaders, ("trainval", "test")):
        labels = torch.cat([batch["labels"] for batch in loader])
        assert labels.dtype == torch.int8
        np.testing.assert_array_equal(labels, dataset.labels(split))
        assert set(labels.unique().tolist()) == {-1, 0, 1}


def test_labels_of_coco_are_its_categories(tmp_path: Path) -> None:
    write_coco(tmp_path, train=4, val=3)
    data = attached(MultiLabelData(COCO(tmp_path), "train", "val", fit=True, image=SMALL, batch_size=2, num_workers=0))
    assert list(data.class_names) == ["person", "dog", "car"]
    labels = torch.cat([batch["labels"] for batch in data.test_dataloader()])
    # Image k has the first k categories.
    assert labels.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert {tuple(batch["image"].shape) for batch in data.train_dataloader()} == {(2, 3, 8, 8)}


def means(dataset: Any, **options: Any) -> np.ndarray:
    audio = AudioInput(sample_rate=8_000, duration=0.5, fft=256, frames_per_second=40)
    data = SoundClassificationData(dataset, num_workers=0, audio=audio, **options)
    data.prepare_data()
    data.setup("test")
    return data.statistics_of_bins["mean"]


def test_statistics_of_windows_are_kept_apart_by_how_these_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    world = AudioVisualWorld(seed=3, esc_clips_per_fold=1)
    world.prepare(["esc50"])

    def of_world(**options: Any) -> np.ndarray:
        return means(ESC50(world.root_of("esc50")), train_split="all", test_split="all", **options)

    first = of_world(test_windows=3)
    with monkeypatch.context() as patch:
        patch.setattr(protocol_data, "write_audio_statistics", None)  # must use the stored statistics
        np.testing.assert_array_equal(of_world(test_windows=3, seed=1), first)
    assert protocol_data.STATISTICS_CLIPS == 10_000  # docs/papers/avid_cma.md [2.3]
    assert not np.array_equal(of_world(test_windows=5), first)
    assert not np.array_equal(of_world(test_windows=3, wrap_seconds=3.0), first)


def test_statistics_are_of_the_files_and_not_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))

    def of_folder(name: str, frequency: float | None = None) -> np.ndarray:
        for clip in ("a/1", "a/2", "b/1", "b/2") if frequency else ():
            write_wav(tmp_path / name / f"{clip}.wav", seconds=5.0, rate=8_000, frequency=frequency)
        return means(FolderOfAudio(tmp_path / name), wrap_seconds=None)

    first, second = of_folder("one", 440.0), of_folder("two", 2_000.0)
    assert first.argmax() != second.argmax()
    np.testing.assert_array_equal(of_folder("one"), first)
    np.testing.assert_allclose(of_folder("one", 2_000.0), second)


def test_clips_of_videos_are_as_the_settings_say(tmp_path: Path) -> None:
    data = VideoClassificationData(
        UCF101(tmp_path), fold=1, batch_size=3, num_workers=0, seed=5, clips_per_video=2, test_clips=4,
        clip_accuracy_clips=5, test_batch_size=2, video=VideoInput(fps=8, duration=1.5, crop=16),
    )  # fmt: skip
    data.dataset.listing = lambda *_: listing_of(tmp_path, [Clip(Path(name), 0) for name in "abc"])  # type: ignore
    training, *tests = attached(data).train_dataloader(), *data.test_dataloader()
    common = {"video_duration": 1.5, "video_fps": 8, "seed": 5, "max_skipped_fraction": 0.05, "cache_bytes": 0}
    assert data.clip_options == common
    assert (training.batch_size, len(training.dataset), training.dataset.training) == (3, 6, True)
    found = [(of.batch_size, of.dataset.clips, of.dataset.random_starts) for of in tests]
    assert found == [(2, 4, False), (2, 5, True)]
    assert not tests[0].dataset.video_transform.normalize
    made = data.example_batch(Model(), 30, RandomTensors())
    assert (made.batches, made.facts) == (2 * 9_537 // 3, {"num_classes": None})
    assert (made.batch["video"].shape, len(made.batch["index"])) == ((30, 3, 12, 16, 16), 30)
    assert made.batch["label"].unique().tolist() == [0, 1, 2]


def test_windows_of_sounds_are_as_the_settings_say(tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mean=np.full(65, 2.0), std=np.full(65, 3.0))
    data = SoundClassificationData(
        ESC50(tmp_path), training_windows=3, test_windows=4, wrap_seconds=2.5, excerpt_seconds=1.5, file_batch_size=2,
        num_workers=0, seed=5, audio=AudioInput(fft=256, statistics=str(tmp_path / "statistics.npz")),
    )  # fmt: skip
    data.dataset.listing = lambda *_: listing_of(tmp_path, [Clip(Path(name), 0) for name in "abc"])  # type: ignore
    for loader, windows, training in zip(attached(data).test_dataloader(), (3, 4), (True, False), strict=True):
        own = loader.dataset
        assert (loader.batch_size, own.windows, own.training) == (2, windows, training)
        assert (own.wrap_seconds, own.excerpt_seconds, own.seed, own.skipped.max_share) == (2.5, 1.5, 5, 0.05)
        assert (own.audio_transform.mean[0], own.audio_transform.std[0]) == (2, 3)


class Model:
    num_classes = 3


def test_a_made_up_batch_looks_like_a_real_one(tmp_path: Path) -> None:
    write_imagenet(tmp_path / "imagenet", train=4, val=2)
    write_coco(tmp_path / "coco", train=4, val=3)
    options: dict[str, Any] = {"image": SMALL, "batch_size": 2, "num_workers": 0}
    for data, batches, values in (
        (ClassificationData(ImageNet(tmp_path / "imagenet"), held_out_fraction=0.25, **options), 480_437, [0, 1, 2]),
        (MultiLabelData(COCO(tmp_path / "coco"), "train", "val", fit=True, **options), 59_143, [-1, 0, 1]),
    ):
        example, more = (data.example_batch(Model(), size, RandomTensors()) for size in (2, 30))
        assert (example.batches, example.facts) == (batches, {"num_classes": None})
        assert more.batch["label" if "label" in more.batch else "labels"].unique().tolist() == values
        real, made = next(iter(attached(data).train_dataloader())), example.batch
        # The loader also counts skipped files, and adds a class to images with several labels. Protocols read neither.
        assert set(real) - set(made) <= {"skipped", "label"}
        for name, value in made.items():
            assert (value.shape, value.dtype) == (real[name].shape, real[name].dtype), name
