"""A trained AVID or AVID-CMA to use: embeddings of pictures in motion and of sounds that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.media import MediaError, MediaFile
from common.data.windows import Limits, frame_count, wrapping_indices
from common.encoders.audio import AudioConvNet
from common.encoders.video import R2Plus1D
from common.stages.export import Items, Modality, Trained, TrainedModel, renamed, without_sources
from common.stages.finished import FinishedStage
from papers.avid_cma import module
from papers.avid_cma.data import AudioInput, VideoInput


class AVID(TrainedModel):
    """Trained encoders of video and sound.

    Args:
        trained: see `common.stages.export.Trained`; `AVID.from_export(path)` reads it.

    Attributes:
        model: `papers.avid_cma.model.AudioVisualModel`.
        video, audio: what a clip is.
        clips: clips of each file, evenly spaced over it, whose embeddings are averaged; 1, the middle, when loaded.
    """

    paper = "avid_cma"
    kinds = ("papers.avid_cma.module.AVID", "papers.avid_cma.module.CMA")
    classes: ClassVar[tuple[type, ...]] = (module.AVID, module.CMA, R2Plus1D, AudioConvNet)
    example = "avid_cma/mini/seed0/avid"
    otherwise = "compares no pictures with sounds: give the checkpoint of a stage that does, such as avid or avid_cma"
    embeds: ClassVar[tuple[Modality, ...]] = ("video", "audio")
    retrieves: ClassVar[tuple[tuple[Modality, Modality], ...]] = (
        ("video", "audio"), ("audio", "video"), ("video", "video"), ("audio", "audio"),
    )  # fmt: skip
    limits = (
        "For research on what is seen and heard together: features of videos and sounds, and search of one by the "
        "other. It was trained without labels on what happened to be in the videos, so it names nothing, and it "
        "inherits their biases. It is not made to recognise persons or to decide about them."
    )
    usage = 'model.embed_video("clip.mp4") @ model.embed_audio("clip.mp4").T'

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model = self.build(trained).model
        self.video: VideoInput = self.input(trained, "video", VideoInput)
        self.audio: AudioInput = self.input(trained, "audio", AudioInput)
        self.clips = 1
        stated = self.input(trained, "audio_statistics", dict[str, list[float]])
        statistics = {name: np.array(values) for name, values in stated.items()}
        frames = frame_count(self.video.duration, self.video.fps)
        self._pixels = self.video.transform(training=False).adapted(False, frames)
        self._spectrogram = self.audio.transform(training=False, statistics=statistics)
        self.fill(trained)

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data = stage.data()
        inputs = {
            "video": asdict(data.video),
            "audio": asdict(replace(data.audio, statistics=None)),
            "audio_statistics": {name: value.tolist() for name, value in stage.content["audio_statistics"].items()},
        }
        return Trained(without_sources(stage.config["model"]), inputs, renamed(stage.state, model="model"))

    # -- files ---------------------------------------------------------------------------------------------------------

    def read_video(self, file: str | Path) -> Tensor:
        """The clips of a file, float32 [clips, 3, T, crop, crop].

        Raises:
            MediaError: it cannot be read, or has no picture.
        """
        with MediaFile(file) as media:
            clips = []
            for start, duration in self._windows(media, "video", self.video.duration):
                frames, _ = media.read_video(start, duration, self.video.fps)
                clips.append(self._pixels(frames))
        return torch.stack(clips)

    def read_audio(self, file: str | Path) -> Tensor:
        """Windows of a file's sound as spectrograms, float32 [clips, 1, frames, bins]; a short sound begins anew.

        Raises:
            MediaError: it cannot be read, or has no sound.
        """
        rate, count = self._spectrogram.sample_rate, self._spectrogram.num_samples
        with MediaFile(file) as media:
            windows = []
            for start, duration in self._windows(media, "audio", self.audio.duration):
                samples = media.read_audio(start, duration, rate)
                if not len(samples):
                    raise MediaError.of(media.path, f"no sound could be decoded at {start:.3f} s")
                if len(samples) < count:
                    samples = samples[torch.from_numpy(wrapping_indices(len(samples), 0, count))]
                windows.append(self._spectrogram(samples))
        return torch.stack(windows)

    def _windows(self, media: MediaFile, stream: str, seconds: float) -> Iterator[tuple[float, float]]:
        limits: Limits | None = media.video_limits if stream == "video" else media.audio_limits
        if limits is None:
            raise MediaError.of(media.path, f"has no {stream} stream")
        duration = min(seconds, limits[1] - limits[0])
        for place in (np.arange(self.clips) + 0.5) / self.clips:
            yield limits[0] + float(place) * (limits[1] - limits[0] - duration), duration

    # -- embeddings ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_video(self, videos: Items) -> Tensor:
        """Embeddings of what is seen.

        Args:
            videos: a file, some files, or what `read_video` gives of them.

        Returns:
            Unit vectors [B, d] on the model's device.

        Raises:
            MediaError: a file cannot be read, or has no picture.
        """
        return self._means(self.model.embed_video, self.read_all("video", videos))

    @torch.no_grad()
    def embed_audio(self, sounds: Items) -> Tensor:
        """Embeddings of what is heard; they can be compared with those of `embed_video`.

        Args:
            sounds: a file, video or sound alone, some files, or what `read_audio` gives of them.

        Returns:
            Unit vectors [B, d] on the model's device.

        Raises:
            MediaError: a file cannot be read, or has no sound.
        """
        return self._means(self.model.embed_audio, self.read_all("audio", sounds))

    def _means(self, encode: Callable[[Tensor], Tensor], samples: list[Tensor]) -> Tensor:
        found = F.normalize(encode(torch.cat(samples).to(self.device)).float(), dim=1)
        return F.normalize(torch.stack([own.mean(0) for own in found.split([len(one) for one in samples])]), dim=1)


MODEL = AVID
