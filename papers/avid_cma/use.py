"""Embeds video and audio files with a trained AVID."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.clips import repeated
from common.data.media import Limits, MediaError, MediaFile
from common.data.transforms import AudioInput, VideoInput
from common.encoders.audio import AudioConvNet
from common.encoders.checkpoint_files import below
from common.encoders.heads import ProjectionHead
from common.encoders.video import R2Plus1D
from common.models.finished_stage import FinishedStage
from common.models.safe_builder import path_of
from common.models.trained import Items, Modality, Trained, TrainedModel
from papers.avid_cma import networks


class AVID(networks.AVID, TrainedModel):
    """A trained `networks.AVID`. Averages the embeddings of `clips` evenly spaced clips of a file (1: the middle)."""

    paper = "avid_cma"
    kinds = ("papers.avid_cma.module.AVIDModule",)
    classes: ClassVar[tuple[type, ...]] = (R2Plus1D, AudioConvNet, ProjectionHead)
    example = "avid_cma/mini/seed0/avid"
    otherwise = "cannot embed video and sound: give the checkpoint of a pre-training stage, such as avid or avid_cma"
    embeds: ClassVar[tuple[Modality, ...]] = ("video", "audio")

    clips = 1

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data, arguments, weights = stage.data(), stage.config["model"]["init_args"], below(stage.state, "model.")
        inputs = {
            "video": asdict(data.video),
            "audio": asdict(replace(data.audio, statistics=None)),
            "audio_statistics": {name: value.tolist() for name, value in stage.content["audio_statistics"].items()},
        }

        def head(name: str) -> dict[str, Any]:
            built = {"in_dim": weights[f"{name}.projection.0.weight"].shape[1]}
            built |= {field: arguments[field] for field in ("hidden_dim", "out_dim")}
            built |= {field: arguments[f"head_{field}"] for field in ("layers", "batch_norm", "output_batch_norm")}
            return {"class_path": path_of(ProjectionHead), "init_args": built}

        parts = {
            "video_model": arguments["video_encoder"], "audio_model": arguments["audio_encoder"],
            "video_proj": head("video_proj"), "audio_proj": head("audio_proj"),
        }  # fmt: skip
        return Trained({"class_path": path_of(cls), "init_args": parts}, inputs, weights)

    def read_inputs(self, trained: Trained) -> None:
        video, audio = self.input(trained, "video", VideoInput), self.input(trained, "audio", AudioInput)
        # Mean and standard deviation [F] of each frequency bin.
        found = self.input(trained, "audio_statistics", dict[str, list[float]])
        statistics = {name: np.array(values) for name, values in found.items()}
        self.video, self.audio = video, audio
        self._pixels = video.transform(training=False)
        self._spectrogram = audio.transform(training=False, statistics=statistics)

    def read_video(self, file: str | Path) -> Tensor:
        """Read video clips of a file, float32 [clips, 3, T, crop, crop]."""
        with MediaFile(Path(file)) as media:
            clips = []
            for start, duration in self._windows(media, "video", self.video.duration):
                frames, _ = media.read_video(start, duration, self.video.fps)
                clips.append(self._pixels(frames))
        return torch.stack(clips)

    def read_audio(self, file: str | Path) -> Tensor:
        """Read spectrograms of a file's sound, float32 [clips, 1, frames, bins]. Repeat short sounds."""
        rate, count = self._spectrogram.sample_rate, self._spectrogram.num_samples
        with MediaFile(Path(file)) as media:
            windows = []
            for start, duration in self._windows(media, "audio", self.audio.duration):
                samples = media.read_audio(start, duration, rate)
                windows.append(self._spectrogram(repeated(samples, 0, count)))
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
        """Embed videos as unit vectors [B, d]."""
        return self._means(lambda clips: self.video_proj(self.video_model(clips)), self.read_all("video", videos))

    @torch.no_grad()
    def embed_audio(self, sounds: Items) -> Tensor:
        """Embed sounds as unit vectors [B, d], comparable with the vectors of `embed_video`."""
        return self._means(lambda clips: self.audio_proj(self.audio_model(clips)), self.read_all("audio", sounds))

    def _means(self, encode: Callable[[Tensor], Tensor], samples: list[Tensor]) -> Tensor:
        rows = F.normalize(encode(torch.cat(samples).to(self.device)).float(), dim=1)
        means = [clips.mean(0) for clips in rows.split([len(sample) for sample in samples])]
        return F.normalize(torch.stack(means), dim=1)


MODEL = AVID
