"""Settings of video and audio clips, and the statistics that standardize the sound."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from common.data.media import frame_count
from common.data.transforms import AudioTransform, VideoTransform
from common.encoders.checkpoint_files import read_checkpoint
from common.errors import StageError
from common.files import open_regular, parsing
from common.types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class VideoInput:
    """Settings of a video clip (docs/papers/avid_cma.md [2.2]); see :class:`VideoTransform`."""

    fps: PositiveFloat = 16.0
    duration: PositiveFloat = 0.5
    crop: PositiveInt = 224
    resize: PositiveInt = 256
    mode: Literal["msc", "crop"] = "msc"
    min_area: Fraction = 0.08
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.4, 0.4, 0.4, 0.2)
    keep_aspect: bool = True

    @property
    def frames(self) -> int:
        return frame_count(self.duration, self.fps)

    def transform(self, training: bool) -> VideoTransform:
        options = asdict(self)
        del options["fps"], options["duration"]
        return VideoTransform(**options, frames=self.frames, training=training)


@dataclass(frozen=True)
class AudioInput:
    """Settings of an audio clip (docs/papers/avid_cma.md [2.3]).

    `fft` is in samples, 1024 in the paper (its configs say 512, half of it). `statistics` per frequency bin come from
    an .npz file, the encoder's pre-training checkpoint, or (None) training clips.
    """

    sample_rate: PositiveInt = 24000
    duration: PositiveFloat = 2.0
    fft: PositiveInt = 1024
    frames_per_second: PositiveInt = 100
    volume: Fraction = 0.1
    statistics: str | None = None

    def transform(self, training: bool, statistics: dict[str, np.ndarray] | None = None) -> AudioTransform:
        """The transform with `statistics` (mean and deviation [F]), or in plain decibels without."""
        options = asdict(self) | {name: values.tolist() for name, values in (statistics or {}).items()}
        del options["statistics"]
        return AudioTransform(window=options.pop("duration"), **options, training=training)


def read_statistics(path: Path) -> dict[str, np.ndarray]:
    """Read per-bin audio statistics from an .npz file or one of our pre-training checkpoints."""
    if path.suffix == ".npz":
        with parsing(path, StageError), open_regular(path) as file, np.load(file) as content:
            found = {name: content[name] for name in ("mean", "std") if name in content}
    else:
        checkpoint = read_checkpoint(path)
        found = {name: value.numpy() for name, value in (checkpoint.get("audio_statistics") or {}).items()}
    if set(found) != {"mean", "std"}:
        raise StageError(
            f"data.audio.statistics: {path} holds no audio statistics (`mean` and `std`); give the checkpoint of the "
            "pre-training whose encoder is evaluated, or leave the field empty to compute them"
        )
    return found
