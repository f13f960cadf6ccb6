"""Data modules of labeled videos, sounds and images, for real data and for miniature worlds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from common.data.clips import DenseVideoClips, SoundWindows, VideoClips
from common.data.datasets.audioset import AudioSet
from common.data.datasets.base import MediaDataset
from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.folder import FolderOfImages
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.voc import PascalVOC
from common.data.image_transforms import ImageTransform
from common.data.images import ImageItems
from common.data.item_dataset import Item, Sample
from common.data.listing import Listing, spread
from common.data.transforms import AudioInput, VideoInput, read_statistics, write_audio_statistics
from common.data.worlds.audiovisual import AudioVisualWorld
from common.data.worlds.base import World
from common.files import cache_folder
from common.training.data_module import ShardedDataModule
from common.training.examples import Example, RandomTensors, batches_of_epoch
from common.types import Fraction, NonNegativeInt, PartialFraction, PositiveFloat, PositiveInt

#: Number of training clips to compute audio statistics from (docs/papers/avid_cma.md [2.3]).
STATISTICS_CLIPS = 10_000

# -- videos and sounds -------------------------------------------------------------------------------------------------


class AudioVisualData(ShardedDataModule):
    """Base of the data modules of clips. `video` and `audio` define a clip. ShardedDataModule explains the rest."""

    def __init__(
        self,
        dataset: MediaDataset,
        world: AudioVisualWorld | None = None,
        video: VideoInput = VideoInput(),  # noqa: B008 - frozen
        audio: AudioInput = AudioInput(),  # noqa: B008 - frozen
        batch_size: PositiveInt = 1024,
        max_skipped_fraction: Fraction = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, world, batch_size=batch_size, max_skipped_fraction=max_skipped_fraction, **kwargs)
        if world is not None:
            dataset.common_seconds = None  # all clips of a world are whole
            if isinstance(dataset, AudioSet):
                dataset.clip_list = None  # the list names real clips; use all clips of the world
        self.video = video
        self.audio = audio

    def sounds_of_statistics(self) -> dict[str, Any]:
        """Return the settings that select sounds for audio statistics. They are part of the cache key."""
        return {}

    def audio_statistics(self, listing: Listing, sounds: Dataset[Any] | None = None) -> dict[str, np.ndarray]:
        """Return each bin's `mean` and `std` [F]. Load `audio.statistics`, or compute and cache them from the clips.

        `sounds` is a data set with an item per clip: `audio` in unnormalized decibels. If None, only read the cache.
        """
        audio = self.audio
        if audio.statistics is not None:
            return read_statistics(Path(audio.statistics))
        stamps = [listing[row].stamps() for row in spread(len(listing), STATISTICS_CLIPS)]
        settings = [
            audio.sample_rate, audio.duration, audio.fft, audio.frames_per_second, listing.fingerprint(), stamps,
            self.sounds_of_statistics(),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        path = cache_folder() / "audio_statistics" / f"{listing.name}-{key}.npz"
        if not path.is_file() and sounds is not None:
            # Evenly spaced over the listing, which is deterministic and as good as random.
            chosen = spread(len(sounds), STATISTICS_CLIPS)  # type: ignore[arg-type]
            loader = DataLoader(Subset(sounds, chosen), batch_size=None, num_workers=self.num_workers)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_audio_statistics((sample["audio"] for sample in loader), path)
        return read_statistics(path)


class VideoClassificationData(AudioVisualData):
    """Labeled videos: random clips to train on, dense clips to test on (docs/papers/avid_cma.md [10.1], [10.2]).

    Args:
        fold: number of the official division into training and test, from 1. None if the data set has only one.
        clips_per_video: random clips of each video per training epoch.
        test_clips: evenly spaced clips of each test video, whose class probabilities are averaged.
        clip_accuracy_clips: random clips of each test video for the accuracy of single clips ("Clip@1"). 0 skips this
            metric.
        test_batch_size: videos per test step, per device.
    """

    def __init__(
        self,
        dataset: MediaDataset,
        fold: NonNegativeInt | None = None,
        train_split: str = "train",
        test_split: str = "test",
        clips_per_video: PositiveInt = 10,
        test_clips: PositiveInt = 10,
        clip_accuracy_clips: NonNegativeInt = 0,
        test_batch_size: PositiveInt = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.fold = fold
        self.train_split = train_split
        self.test_split = test_split
        self.clips_per_video = clips_per_video
        self.test_clips = test_clips
        self.clip_accuracy_clips = clip_accuracy_clips
        self.test_batch_size = test_batch_size

    def setup(self, stage: str) -> None:
        self.listing = self.dataset.listing(self.train_split, self.fold)
        self.test_listing = self.dataset.listing(self.test_split, self.fold)

    @property
    def num_classes(self) -> int:
        return len(self.listing.classes)

    @property
    def clip_options(self) -> dict[str, Any]:
        """Return the arguments of all map-style data sets of this module."""
        return {"video_duration": self.video.duration, "video_fps": self.video.fps, **self.item_options}

    @cached_property
    def training_clips(self) -> VideoClips:
        """Make the training set, with `clips_per_video` items for each video."""
        return VideoClips(
            self.listing,
            self.video.transform(training=True),
            clips_per_video=self.clips_per_video,
            **self.clip_options,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.training_clips)

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        """Draw a synthetic batch of `size` clips for a module with `num_classes`."""
        batch = {
            "video": draw.normal(size, 3, self.video.frames, self.video.crop, self.video.crop),
            "index": torch.arange(size),
            "label": draw.integers(0, module.num_classes, size),
        }
        published = self.dataset.published_count(self.train_split, self.fold)
        known = None if published is None else published * self.clips_per_video
        return Example(batch, batches_of_epoch(known, self.batch_size), {"num_classes": None})

    def _test_clips(self, clips: int, random_starts: bool) -> DenseVideoClips:
        # Keep bytes: ten clips of 32 frames take 193 MB as floats, and the loaders hold dozens.
        transform = dataclasses.replace(self.video.transform(training=False), normalize=False)
        return DenseVideoClips(
            self.test_listing,
            transform,
            clips=clips,
            random_starts=random_starts,
            **self.clip_options,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if batch["video"].dtype == torch.uint8:
            batch["video"] = self.video.transform(training=False).normalized(batch["video"])
            # Before this hook, Lightning converts a batch to the weights' precision, but not bytes.
            batch = self.trainer.precision_plugin.convert_input(batch)
        return batch

    def test_dataloader(self) -> list[DataLoader[Any]]:
        loaders = [self.evaluation_loader(self._test_clips(self.test_clips, False), self.test_batch_size)]
        if self.clip_accuracy_clips:
            random_clips = self._test_clips(self.clip_accuracy_clips, True)
            loaders.append(self.evaluation_loader(random_clips, self.test_batch_size, "random clips"))
        return loaders


class SoundClassificationData(AudioVisualData):
    """Windows of labeled sounds for an SVM on frozen features (docs/papers/avid_cma.md [10.3]). Only has test loaders.

    Args:
        train_split, test_split: names of the splits. Give the same name twice if folds divide a single split.
        training_windows, test_windows: windows per file.
        wrap_seconds: use only this many seconds from the start of a file. Windows start anywhere in this part and wrap
            around at its end (ESC-50). None cuts excerpts of `excerpt_seconds` from the whole file (DCASE).
        file_batch_size: files per step, per device.
    """

    def __init__(
        self,
        dataset: MediaDataset,
        train_split: str = "train",
        test_split: str = "test",
        training_windows: PositiveInt = 10,
        test_windows: PositiveInt = 10,
        wrap_seconds: PositiveFloat | None = 4.9,
        excerpt_seconds: PositiveFloat = 4.0,
        file_batch_size: PositiveInt = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.train_split = train_split
        self.test_split = test_split
        self.training_windows = training_windows
        self.test_windows = test_windows
        self.wrap_seconds = wrap_seconds
        self.excerpt_seconds = excerpt_seconds
        self.file_batch_size = file_batch_size

    def sounds_of_statistics(self) -> dict[str, Any]:
        """Return settings for windows that are spread evenly over each file, independent of the seed."""
        return {"windows": self.test_windows, "wrap_seconds": self.wrap_seconds}

    def prepare_data(self) -> None:
        super().prepare_data()
        listing = self.dataset.listing(self.train_split)
        self.audio_statistics(listing, self._windows(listing, False, None))

    def setup(self, stage: str) -> None:
        self.listing = self.dataset.listing(self.train_split)
        self.test_listing = self.dataset.listing(self.test_split)
        self.statistics_of_bins = self.audio_statistics(self.listing)

    @property
    def num_classes(self) -> int:
        return len(self.listing.classes)

    def _windows(self, listing: Listing, training: bool, statistics: dict[str, np.ndarray] | None) -> SoundWindows:
        return SoundWindows(
            listing,
            self.audio.transform(training, statistics),
            training=training,
            windows=self.training_windows if training else self.test_windows,
            wrap_seconds=self.wrap_seconds,
            excerpt_seconds=self.excerpt_seconds,
            **self.item_options,
        )

    def test_example(self, draw: RandomTensors) -> Example:
        """Draw a synthetic window as input of the encoder. Also give the published data set's number of windows."""
        audio = self.audio.transform(training=False)
        counts = [self.dataset.published_count(split) for split in (self.train_split, self.test_split)]
        windows = [self.training_windows, self.test_windows]
        total = sum(n * w for n, w in zip(counts, windows)) if None not in counts else None
        return Example(draw.normal(1, 1, audio.num_frames, audio.num_bins), total)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        training = self._windows(self.listing, True, self.statistics_of_bins)
        test = self._windows(self.test_listing, False, self.statistics_of_bins)
        return [
            self.evaluation_loader(training, self.file_batch_size, "training"),
            self.evaluation_loader(test, self.file_batch_size),
        ]


# -- images ------------------------------------------------------------------------------------------------------------


class ImageData(ShardedDataModule):
    """Base of the data modules of images. Sets `training` of the transform `image`; None means MoCo v2's views."""

    def __init__(
        self,
        dataset: COCO | COCOKarpathy | ImageNet | PascalVOC | FolderOfImages,
        world: World | None = None,
        image: ImageTransform | None = None,
        batch_size: PositiveInt = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, world, batch_size=batch_size, **kwargs)
        self.image = image or ImageTransform()

    def options(self, training: bool) -> dict[str, Any]:
        """Return the arguments of all map-style data sets of this module."""
        return {"transform": self.image, "training": training, **self.item_options}

    def example_images(self, size: int, draw: RandomTensors) -> dict[str, Tensor]:
        """Draw a synthetic batch of `size` images: `image` and `index`."""
        return {"image": draw.normal(size, 3, self.image.crop, self.image.crop), "index": torch.arange(size)}


class ClassificationData(ImageData):
    """Images of one class each, for linear classifiers and for training with labels (docs/papers/mct.md [9]).

    Args:
        held_out_fraction: fraction of the training images to hold out for choosing a learning rate, evenly spaced over
            classes. If not 0, the test has two loaders: held-out images and test images.
        test_batch_size: images per test step, per device.
    """

    def __init__(
        self,
        dataset: ImageNet | FolderOfImages,
        train_split: str = "train",
        test_split: str = "validation",
        held_out_fraction: PartialFraction = 0.01,
        test_batch_size: PositiveInt = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.train_split = train_split
        self.test_split = test_split
        self.held_out_fraction = held_out_fraction
        self.test_batch_size = test_batch_size

    def setup(self, stage: str) -> None:
        listing = self.dataset.listing(self.train_split)
        # Listings are sorted by class, so evenly spaced images cover all classes.
        self.held_out_listing, self.listing = hold_out(listing, self.held_out_fraction)
        self.test_listing = self.dataset.listing(self.test_split)

    @property
    def num_classes(self) -> int:
        return len(self.listing.classes)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(ImageItems(self.listing, **self.options(training=True)))

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        """Draw a synthetic batch of `size` images for a module with `num_classes`."""
        batch = self.example_images(size, draw) | {"label": draw.integers(0, module.num_classes, size)}
        published = self.dataset.published_count(self.train_split)
        items = None if published is None else round(published * (1 - self.held_out_fraction))
        return Example(batch, batches_of_epoch(items, self.batch_size), {"num_classes": None})

    def test_dataloader(self) -> Any:
        def loader(listing: Listing, role: str) -> DataLoader[Any]:
            return self.evaluation_loader(
                ImageItems(listing, **self.options(training=False)), self.test_batch_size, role
            )

        test = loader(self.test_listing, "test")
        return [loader(self.held_out_listing, "held-out training"), test] if self.held_out_fraction else test


def hold_out(listing: Listing, share: float, required: bool = False) -> tuple[Listing, Listing]:
    """Split off an evenly spaced share of a listing. It may only be empty if `share` is 0 and not `required`."""
    held_out = np.diff(np.floor(np.arange(len(listing) + 1) * share + 0.5)) > 0
    if (share or required) and not held_out.any():
        raise ValueError(f"data.held_out_fraction={share} holds out none of {len(listing)} images; raise it")
    return listing.subset(np.flatnonzero(held_out)), listing.subset(np.flatnonzero(~held_out))


class LabeledImages(ImageItems):
    """Images with several labels each, int8 [N, C]: 1 present, 0 absent, -1 ignored. See ImageItems for options."""

    def __init__(self, listing: Listing, labels: np.ndarray, **options: Any) -> None:
        super().__init__(listing, **options)
        self.labels = labels

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        return {**super().read(item, rng), "labels": torch.from_numpy(self.labels[item.file].astype(np.int8))}


class MultiLabelData(ImageData):
    """Images with several labels each: Pascal VOC, or the categories of COCO's instances (docs/papers/mct.md [9]).

    Args:
        fit: True to train a model on the training images. False gives the test two loaders, training and test images.
        test_batch_size: images per test step, per device.
    """

    def __init__(
        self,
        dataset: PascalVOC | COCO | FolderOfImages,
        train_split: str = "trainval",
        test_split: str = "test",
        fit: bool = False,
        test_batch_size: PositiveInt = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.train_split = train_split
        self.test_split = test_split
        self.fit = fit
        self.test_batch_size = test_batch_size

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def class_names(self) -> Sequence[str]:
        if isinstance(self.dataset, PascalVOC):
            return self.dataset.listing(self.train_split).classes
        return self.dataset.annotations(self.train_split).tag_names

    def images(self, split: str, training: bool) -> LabeledImages:
        listing = self.dataset.listing(split)
        if isinstance(self.dataset, PascalVOC):
            labels = self.dataset.labels(split, listing)
        else:
            labels = self.dataset.annotations(split, listing).tags
        if not (labels > 0).any():
            raise ValueError(f"{listing.root}: no image of {split} has a label (docs/own-data.md)")
        return LabeledImages(listing, labels, **self.options(training))

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.images(self.train_split, training=True))

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        """Draw a synthetic batch of `size` images for a module with `num_classes`."""
        batch = self.example_images(size, draw)
        batch["labels"] = draw.integers(-1, 2, size, module.num_classes).to(torch.int8)
        batches = batches_of_epoch(self.dataset.published_count(self.train_split), self.batch_size)
        return Example(batch, batches, {"num_classes": None})

    def test_example(self, draw: RandomTensors) -> Example:
        """Draw a synthetic image as input of the encoder. Also give the number of training and test images together."""
        counts = [self.dataset.published_count(split) for split in (self.train_split, self.test_split)]
        total = None if None in counts else sum(counts)
        return Example(self.example_images(1, draw)["image"], total)

    def test_dataloader(self) -> Any:
        test = self.evaluation_loader(self.images(self.test_split, training=False), self.test_batch_size)
        if self.fit:
            return test
        train = self.images(self.train_split, training=False)
        return [self.evaluation_loader(train, self.test_batch_size, "training"), test]
