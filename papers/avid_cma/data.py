"""Data modules of AVID-CMA: pre-training pairs, action recognition, sound classification.

The miniature uses the very same classes: its world writes files in the layouts of Kinetics, UCF-101, HMDB-51, ESC-50
and DCASE, and the data sets are pointed there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from common.data.clips import AudioVisualClips, DenseVideoClips, SoundWindows, VideoClips
from common.data.datasets.audioset import AudioSet
from common.data.datasets.base import MediaDataset
from common.data.listing import Listing
from common.data.transforms import AudioTransform, VideoTransform, compute_audio_statistics
from common.data.worlds.audiovisual import AudioVisualWorld
from common.files import cache_folder
from common.training.data_module import ShardedDataModule

#: Training clips that fresh audio statistics are computed from (specification 2.3).
STATISTICS_CLIPS = 10_000


@dataclass(frozen=True)
class VideoInput:
    """What a video clip is (specification 2.2).

    Attributes:
        fps, duration: frames per second and seconds of a clip.
        crop: side of the clip in pixels.
        resize: shorter side before the centre crop of an evaluation.
        mode: `msc` (random resized crop) or `crop` (resize, then random crop).
        min_area: smallest share of the area that a random resized crop takes.
        jitter: strengths of brightness, contrast, saturation and hue jitter in training.
        keep_aspect: False squeezes the frames to a square before cropping, as the released probe does.
    """

    fps: float = 16.0
    duration: float = 0.5
    crop: int = 224
    resize: int = 256
    mode: Literal["msc", "crop"] = "msc"
    min_area: float = 0.08
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.2)
    keep_aspect: bool = True

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return int(self.duration * self.fps)

    def transform(self, training: bool) -> VideoTransform:
        """Frames to the encoder's input."""
        return VideoTransform(
            mode=self.mode,
            crop=self.crop,
            resize=self.resize,
            keep_aspect=self.keep_aspect,
            min_area=self.min_area,
            jitter=self.jitter,
            frames=self.frames,
            training=training,
        )


@dataclass(frozen=True)
class AudioInput:
    """What an audio clip is (specification 2.3).

    Attributes:
        sample_rate, duration: samples per second and seconds of a clip.
        fft: FFT length in samples, 1024 in the paper (its configs say 512, half of it).
        frames_per_second: spectrogram frames per second.
        volume: half-width of the random gain around 1 in training.
        statistics: mean and deviation of each frequency bin: an .npz file, or the checkpoint of the pre-training whose
            encoder is used. None computes them once from training clips.
    """

    sample_rate: int = 24000
    duration: float = 2.0
    fft: int = 1024
    frames_per_second: int = 100
    volume: float = 0.1
    statistics: str | None = None

    def transform(self, training: bool, statistics: dict[str, np.ndarray] | None = None) -> AudioTransform:
        """Samples to the encoder's input.

        Args:
            training: whether the volume is drawn.
            statistics: mean and deviation [F] of each bin; None leaves plain decibels.
        """
        return AudioTransform(
            sample_rate=self.sample_rate,
            window=self.duration,
            fft=self.fft,
            frames_per_second=self.frames_per_second,
            volume=self.volume,
            training=training,
            **({} if statistics is None else {name: values.tolist() for name, values in statistics.items()}),
        )


class AudioVisualData(ShardedDataModule):
    """What the three data modules share: the data set or its stand-in from the world, and the transforms.

    Args:
        video, audio: what a clip is.
        dataset, world, batch_size, max_skipped_share, kwargs: see ShardedDataModule.
    """

    def __init__(
        self,
        dataset: MediaDataset,
        world: AudioVisualWorld | None = None,
        video: VideoInput = VideoInput(),
        audio: AudioInput = AudioInput(),
        batch_size: int = 1024,
        max_skipped_share: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, world, batch_size=batch_size, max_skipped_share=max_skipped_share, **kwargs)
        if world is not None and isinstance(dataset, AudioSet):
            dataset.clip_list = None  # it names real clips, and all of the world's stand for them
        self.video = video
        self.audio = audio

    def video_transform(self, training: bool) -> VideoTransform:
        """The video pipeline of specification 2.2."""
        return self.video.transform(training)

    def audio_transform(self, training: bool, statistics: dict[str, np.ndarray] | None = None) -> AudioTransform:
        """The audio pipeline of specification 2.3; in plain decibels without statistics."""
        return self.audio.transform(training, statistics)

    def sounds_of_statistics(self) -> dict[str, Any]:
        """What chooses the sounds in the files that statistics are of; other choices are kept apart."""
        return {}

    def audio_statistics(self, listing: Listing, sounds: Dataset[Any] | None = None) -> dict[str, np.ndarray]:
        """Mean and deviation [F] of each bin: from `audio.statistics`, or computed once from the clips and kept.

        Args:
            listing: the clips that the statistics are of.
            sounds: items with `audio` in plain decibels, one per clip; None reads what an earlier call kept.

        Raises:
            FileNotFoundError: `audio.statistics` names a file that does not exist.
            ValueError: the file holds no statistics.
        """
        audio = self.audio
        if audio.statistics is not None:
            return read_statistics(Path(audio.statistics))
        settings = [
            audio.sample_rate, audio.duration, audio.fft, audio.frames_per_second, listing.fingerprint(),
            self.sounds_of_statistics(),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        path = cache_folder() / "audio_statistics" / f"{listing.name}-{key}.npz"
        if not path.is_file() and sounds is not None:
            # Evenly spaced over the listing: as good as random, and the same for everyone.
            count = len(sounds)  # type: ignore[arg-type]
            chosen = np.unique(np.linspace(0, count - 1, min(count, STATISTICS_CLIPS)).astype(int)).tolist()
            loader = DataLoader(Subset(sounds, chosen), batch_size=None, num_workers=self.num_workers)
            path.parent.mkdir(parents=True, exist_ok=True)
            compute_audio_statistics((sample["audio"] for sample in loader), path)
        return read_statistics(path)


def read_statistics(path: Path) -> dict[str, np.ndarray]:
    """Read per-bin audio statistics from an .npz file or from one of our pre-training checkpoints."""
    if not path.is_file():
        raise FileNotFoundError(f"data.audio.statistics: {path} does not exist")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as content:
            found = {name: content[name] for name in ("mean", "std") if name in content}
    else:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = {name: value.numpy() for name, value in (checkpoint.get("audio_statistics") or {}).items()}
    if set(found) != {"mean", "std"}:
        raise ValueError(
            f"data.audio.statistics: {path} holds no audio statistics (`mean` and `std`); give the checkpoint of the "
            "pre-training whose encoder is evaluated, or leave the field empty to compute them"
        )
    return found


class PretrainingData(AudioVisualData):
    """Unlabelled videos with sound, each seen `clips_per_video` times per epoch (specification 2).

    Args:
        jitter_seconds: how far the video clip may lie outside the audio clip's window.
        clips_per_video: clips drawn from each video per epoch.
        split, held_out_split: listings for training and for the diagnostics after it.
        held_out_batch_size: clips per step of the diagnostics, per device.
        require_audio: a clip without a sound track is skipped and counted; otherwise its sound is silence, as in the
            released code.
        kwargs: see AudioVisualData and ShardedDataModule.
    """

    def __init__(
        self,
        dataset: MediaDataset,
        jitter_seconds: float = 0.5,
        clips_per_video: int = 10,
        split: str = "train",
        held_out_split: str = "validation",
        held_out_batch_size: int = 32,
        require_audio: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.jitter_seconds = jitter_seconds
        self.clips_per_video = clips_per_video
        self.split = split
        self.held_out_split = held_out_split
        self.held_out_batch_size = held_out_batch_size
        self.require_audio = require_audio

    def sounds_of_statistics(self) -> dict[str, Any]:
        """A sound clip of every file at a time drawn by the seed, with room for the picture's clip around it."""
        return {"seed": self.seed, "video_duration": self.video.duration, "require_audio": self.require_audio}

    def prepare_data(self) -> None:
        super().prepare_data()
        listing = self.dataset.listing(self.split)
        sounds = AudioVisualClips(
            listing,
            None,  # of the picture nothing is decoded
            self.audio_transform(training=False),
            video_duration=self.video.duration,
            training=False,
            require_audio=self.require_audio,
            **self.item_options,
        )
        self.audio_statistics(listing, sounds)

    def setup(self, stage: str) -> None:
        self.listing = self.dataset.listing(self.split)
        self.held_out_listing = self.dataset.listing(self.held_out_split)
        self.statistics_of_bins = self.audio_statistics(self.listing)

    def _clips(self, listing: Listing, training: bool) -> AudioVisualClips:
        return AudioVisualClips(
            listing,
            self.video_transform(training),
            self.audio_transform(training, self.statistics_of_bins),
            video_duration=self.video.duration,
            video_fps=self.video.fps,
            jitter=self.jitter_seconds,
            training=training,
            require_audio=self.require_audio,
            clips_per_video=self.clips_per_video if training else 1,
            **self.item_options,
        )

    @cached_property
    def training_clips(self) -> AudioVisualClips:
        """The training set; its length is clips x clips_per_video."""
        return self._clips(self.listing, training=True)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.training_clips)

    @cached_property
    def held_out_clips(self) -> AudioVisualClips:
        """Clips that training never sees, without augmentation."""
        return self._clips(self.held_out_listing, training=False)

    def val_dataloader(self) -> DataLoader[Any]:
        # The loss needs an instance's bank row, so it is that of the training clips, without augmentation.
        clips = self._clips(self.listing, training=False)
        return self.evaluation_loader(clips, self.held_out_batch_size, "validation")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.held_out_clips, self.held_out_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()


class VideoClassificationData(AudioVisualData):
    """Labelled videos: random clips to train on, dense clips to test on (specification 10.1, 10.2).

    Args:
        fold: official split, from 1; None where the set has none.
        train_split, test_split: names of the listings.
        clips_per_video: random clips of each video per training epoch.
        test_clips: evenly spaced clips of each test video, whose class probabilities are averaged.
        clip_accuracy_clips: random clips of each test video scored one by one ("Clip@1"); 0 leaves that out.
        test_batch_size: videos per test step, per device.
        kwargs: see AudioVisualData and ShardedDataModule.
    """

    def __init__(
        self,
        dataset: MediaDataset,
        fold: int | None = None,
        train_split: str = "train",
        test_split: str = "test",
        clips_per_video: int = 10,
        test_clips: int = 10,
        clip_accuracy_clips: int = 0,
        test_batch_size: int = 8,
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
        """Number of classes of the listing; known after setup."""
        return len(self.listing.classes)

    @cached_property
    def training_clips(self) -> VideoClips:
        """The training set; its length is videos x clips_per_video."""
        return VideoClips(
            self.listing,
            self.video_transform(training=True),
            video_duration=self.video.duration,
            video_fps=self.video.fps,
            clips_per_video=self.clips_per_video,
            **self.item_options,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.training_clips)

    def _test_clips(self, clips: int, random_starts: bool) -> DenseVideoClips:
        return DenseVideoClips(
            self.test_listing,
            self.video_transform(training=False),
            clips=clips,
            random_starts=random_starts,
            video_duration=self.video.duration,
            video_fps=self.video.fps,
            **self.item_options,
        )

    def test_dataloader(self) -> list[DataLoader[Any]]:
        loaders = [self.evaluation_loader(self._test_clips(self.test_clips, False), self.test_batch_size)]
        if self.clip_accuracy_clips:
            random_clips = self._test_clips(self.clip_accuracy_clips, True)
            loaders.append(self.evaluation_loader(random_clips, self.test_batch_size, "random clips"))
        return loaders


class SoundClassificationData(AudioVisualData):
    """Labelled sounds as windows, for a classifier on frozen features (specification 10.3). There is no fit.

    Args:
        train_split, test_split: names of the listings; equal where folds divide one listing.
        training_windows, test_windows: windows per file.
        wrap_seconds: windows start anywhere in the first so many seconds and go on at the file's beginning (ESC-50);
            None cuts excerpts of `excerpt_seconds` from the whole file (DCASE).
        excerpt_seconds: length of those excerpts.
        file_batch_size: files per step, per device.
        kwargs: see AudioVisualData and ShardedDataModule.
    """

    def __init__(
        self,
        dataset: MediaDataset,
        train_split: str = "train",
        test_split: str = "test",
        training_windows: int = 10,
        test_windows: int = 10,
        wrap_seconds: float | None = 4.9,
        excerpt_seconds: float = 4.0,
        file_batch_size: int = 8,
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
        """Windows spread evenly over every file, whatever the seed."""
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
        """Number of classes of the listing; known after setup."""
        return len(self.listing.classes)

    def _windows(self, listing: Listing, training: bool, statistics: dict[str, np.ndarray] | None) -> SoundWindows:
        return SoundWindows(
            listing,
            self.audio_transform(training, statistics),
            training=training,
            windows=self.training_windows if training else self.test_windows,
            wrap_seconds=self.wrap_seconds,
            excerpt_seconds=self.excerpt_seconds,
            **self.item_options,
        )

    def test_dataloader(self) -> list[DataLoader[Any]]:
        training = self._windows(self.listing, True, self.statistics_of_bins)
        test = self._windows(self.test_listing, False, self.statistics_of_bins)
        return [
            self.evaluation_loader(training, self.file_batch_size, "training"),
            self.evaluation_loader(test, self.file_batch_size),
        ]
