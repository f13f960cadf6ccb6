"""Pre-training data: unlabeled videos with sound. The miniature's files are read by the same classes."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch.utils.data import DataLoader

from common.data.clips import AudioVisualClips
from common.data.datasets.base import MediaDataset
from common.data.listing import Listing
from common.protocols.data import AudioVisualData
from common.training.examples import Example, RandomTensors, batches_of_epoch
from common.types import NonNegativeFloat, PositiveInt


class PretrainingData(AudioVisualData):
    """Loads unlabeled videos with sound. An epoch shows `clips_per_video` clips of each video ([2]).

    Args:
        jitter_seconds: how far the video clip may extend beyond the audio clip's window.
        split, held_out_split: splits for training and for the diagnostics after training.
        held_out_batch_size: clips per step and device in the diagnostics.
        kwargs: see AudioVisualData and ShardedDataModule.
    """

    def __init__(
        self,
        dataset: MediaDataset,
        jitter_seconds: NonNegativeFloat = 0.5,
        clips_per_video: PositiveInt = 10,
        split: str = "train",
        held_out_split: str = "validation",
        held_out_batch_size: PositiveInt = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.jitter_seconds = jitter_seconds
        self.clips_per_video = clips_per_video
        self.split = split
        self.held_out_split = held_out_split
        self.held_out_batch_size = held_out_batch_size

    def sounds_of_statistics(self) -> dict[str, Any]:
        # Take the audio clip at a random time (given by the seed) that leaves room for the video clip around it.
        return {"seed": self.seed, "video_duration": self.video.duration}

    def prepare_data(self) -> None:
        super().prepare_data()
        self.dataset.listing(self.held_out_split)  # fail early: opening all training clips takes long
        listing = self.dataset.listing(self.split)
        # Items without frames, so that no video is decoded.
        transform, options = self.audio.transform(training=False), self.item_options
        sounds = AudioVisualClips(
            listing, None, transform, video_duration=self.video.duration, training=False, **options
        )
        self.audio_statistics(listing, sounds)

    def setup(self, stage: str) -> None:
        self.listing = self.dataset.listing(self.split)
        self.held_out_listing = self.dataset.listing(self.held_out_split)
        self.statistics_of_bins = self.audio_statistics(self.listing)

    def _clips(self, listing: Listing, training: bool) -> AudioVisualClips:
        return AudioVisualClips(
            listing,
            self.video.transform(training),
            self.audio.transform(training, self.statistics_of_bins),
            video_duration=self.video.duration,
            video_fps=self.video.fps,
            jitter=self.jitter_seconds,
            training=training,
            clips_per_video=self.clips_per_video if training else 1,
            **self.item_options,
        )

    @cached_property
    def training_clips(self) -> AudioVisualClips:
        return self._clips(self.listing, training=True)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.training_clips)

    @cached_property
    def held_out_clips(self) -> AudioVisualClips:
        return self._clips(self.held_out_listing, training=False)

    def val_dataloader(self) -> DataLoader[Any]:
        # The loss needs an instance's bank row, so validation uses the training clips, without augmentation.
        clips = self._clips(self.listing, training=False)
        return self.evaluation_loader(clips, self.held_out_batch_size, "validation")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.held_out_clips, self.held_out_batch_size)

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        published = self.dataset.published_count(self.split, None)
        items = 1000 if self.world is not None or published is None else published
        spectrogram = self.audio.transform(training=False)
        batch = {
            "video": draw.normal(size, 3, self.video.frames, self.video.crop, self.video.crop),
            "audio": draw.normal(size, 1, spectrogram.num_frames, spectrogram.num_bins),
            "index": draw.integers(0, items, size),
        }
        known = None if published is None else published * self.clips_per_video
        return Example(batch, batches_of_epoch(known, self.batch_size), {"listing": range(items)})
