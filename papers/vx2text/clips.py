"""Cut video clips and sound from a file or a folder of frames, for VX2TEXT's classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.clips import limits_of
from common.data.item_dataset import Sample, together
from common.data.listing import Clip
from common.data.media import FileCache, FrameFolder, MediaFile, open_media
from common.data.transforms import CACHED_SAMPLES, VideoTransform, to_length
from common.training.examples import RandomTensors
from common.types import NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class VideoInput:
    """Format of the clips of a video ([2] and [3]).

    Attributes:
        fps, frames: frames per second, and frames in a clip.
        clips: S, clips per video, spread over its length.
        crop: height and width of a clip in pixels.
        resize: shorter side before cropping.
        mean, std: per channel; must match the classifier's pre-training.
    """

    fps: PositiveFloat = 15.0
    frames: PositiveInt = 32
    clips: PositiveInt = 4
    crop: PositiveInt = 112
    resize: PositiveInt = 128
    mean: tuple[float, float, float] = (0.43216, 0.394666, 0.37645)
    std: tuple[float, float, float] = (0.22803, 0.22145, 0.216989)


DEFAULT_VIDEO = VideoInput()
ONE_CLIP = VideoInput(clips=1)


@dataclass(frozen=True)
class AudioInput:
    """Format of the sound of a video: the spectrogram of PANNs at 16 kHz ([3]).

    Attributes:
        sample_rate, seconds: samples per second, and length of the sound that the classifier reads.
        window, hop: of the Fourier transform, in samples.
        mel_bins, low, high: number of bands, and their lowest and highest frequency in Hz.
    """

    sample_rate: PositiveInt = 16000
    seconds: PositiveFloat = 10.0
    window: PositiveInt = 512
    hop: PositiveInt = 160
    mel_bins: PositiveInt = 64
    low: NonNegativeFloat = 50.0
    high: PositiveFloat = 8000.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= self.sample_rate / 2:
            raise ValueError(
                f"data.audio: low {self.low} and high {self.high} must be between 0 and half the sample rate "
                f"({self.sample_rate / 2:g} Hz), and low below high"
            )

    @property
    def samples(self) -> int:
        return round(self.seconds * self.sample_rate)


DEFAULT_AUDIO = AudioInput()


class LogMel:
    """Computes the mel spectrogram of samples in decibels, as PANNs does.

    Takes the power with a centered, periodic Hann window and reflect padding, sums it in Slaney bands of unit area, and
    returns 10 log10(max(sum, 1e-10)). Doesn't normalize the result, because the network's first layer does.

    Shapes:
        list of [N] -> list of [1, 1, N // hop + 1, mel_bins], one clip with one channel each

    Source: [3].
    """

    def __init__(self, audio: AudioInput) -> None:
        from torchaudio.functional import melscale_fbanks

        self.audio = audio
        self._hann = torch.hann_window(audio.window)
        self._bands = melscale_fbanks(
            audio.window // 2 + 1,
            audio.low,
            audio.high,
            audio.mel_bins,
            audio.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )

    def __call__(self, sounds: Sequence[Tensor]) -> list[Tensor]:
        length = self.audio.samples
        spectra: list[Tensor] = []
        stacked = torch.stack([to_length(sound, length) for sound in sounds])
        for samples in stacked.split(max(CACHED_SAMPLES // length, 1)):
            spectrum = torch.stft(samples, self.audio.window, self.audio.hop, window=self._hann, return_complex=True)
            # Multiply one at a time, because a batched product may round differently.
            for power in torch.view_as_real(spectrum).square().sum(-1):
                spectra.append(power.T @ self._bands)
        return list(torch.stack(spectra).clamp_min_(1e-10).log10_().mul_(10.0)[:, None, None])


class ClipReader:
    """Cuts clips and a window of sound from a video. Skips a modality whose format is None.

    In training, one clip starts at random in each of S equal parts of the video, with one random crop for all clips. In
    evaluation, clips and crops are centered. A video with too few frames is looped, and short sound is padded with
    silence. The cache holds up to `cache_bytes` of decoded files.
    """

    def __init__(
        self, video: VideoInput | None, audio: AudioInput | None, training: bool, cache_bytes: int = 0
    ) -> None:
        self.video = video
        self.audio = audio
        self.training = training
        self.cache = FileCache.shared(cache_bytes)
        if audio is not None:
            self.log_mel = LogMel(audio)
        if video is not None:
            self.video_transform = VideoTransform(
                mode="crop",
                crop=video.crop,
                resize=video.resize,
                jitter=(0.0, 0.0, 0.0, 0.0),  # because texts mention colors
                flip=0.0,  # because texts mention left and right
                mean=video.mean,
                std=video.std,
                training=training,
            )

    def sample(self, clip: Clip, rng: np.random.Generator) -> Sample:
        sample = self.read(clip, rng)
        self.transform([sample])
        return sample

    def read(self, clip: Clip, rng: np.random.Generator) -> Sample:
        """Cut one sample: `video` and `audio`, as arguments for `transform`, and `video_present` and `audio_present`.

        A missing video is black, and a missing sound is silent.
        """
        sample: Sample = {}
        # Each modality uses separate random numbers, so that leaving one out doesn't change the other.
        place, *places = rng.random(1 if self.video is None else 1 + self.video.clips)
        with open_media(clip.path, self.cache) as media:
            if (video := self.video) is not None:
                present = media.video_limits is not None
                frames = self._frames(media, clip, video, np.array(places)) if present else black(video)
                sample |= {"video": (frames, self.video_transform.draw(rng)), "video_present": torch.tensor(present)}
            if (audio := self.audio) is not None:
                present = media.audio_limits is not None
                samples = self._window(media, clip, audio, place) if present else torch.zeros(0)
                sample |= {"audio": (samples,), "audio_present": torch.tensor(present)}
        return sample

    def transform(self, batch: Sequence[Sample]) -> None:
        """Turn what `read` cut into `video` [S, 3, T, crop, crop] and `audio` [1, 1, frames, mel_bins], in float32."""
        if self.video is not None:
            together(batch, "video", self.video_transform.together)
            for sample in batch:
                clips = sample["video"].unflatten(1, (self.video.clips, self.video.frames))
                sample["video"] = clips.transpose(0, 1).contiguous()
        if self.audio is not None:
            together(batch, "audio", self.log_mel)

    def _frames(
        self, media: MediaFile | FrameFolder, clip: Clip, video: VideoInput, places: npt.NDArray[np.float64]
    ) -> Tensor:
        start, end = limits_of(media.video_limits, clip, "video")
        duration = min(video.frames / video.fps, end - start)
        slower = min(media.video_fps, video.fps)
        if duration < 1 / slower:  # some moments of TVC are shorter than one frame at TVQA's rate
            duration = 1.5 / slower
        within = (np.arange(video.clips) + (places if self.training else 0.5)) / video.clips
        pieces = []
        for begin in (start + within * max(end - start - duration, 0.0)).tolist():
            frames, _ = media.read_video(begin, duration, video.fps)
            looped = len(frames) < video.frames
            pieces.append(frames[torch.arange(video.frames) % len(frames)] if looped else frames[: video.frames])
        return torch.cat(pieces)

    def _window(self, media: MediaFile | FrameFolder, clip: Clip, audio: AudioInput, place: float) -> Tensor:
        start, end = limits_of(media.audio_limits, clip, "audio")
        begin = start + (place if self.training else 0.5) * max(end - start - audio.seconds, 0.0)
        return media.read_audio(begin, min(audio.seconds, end - begin), audio.sample_rate)


def black(video: VideoInput) -> Tensor:
    return torch.zeros(video.clips * video.frames, video.resize, video.resize, 3, dtype=torch.uint8)


def made_up_clips(
    video: VideoInput | None, audio: AudioInput | None, size: int, draw: RandomTensors
) -> dict[str, Tensor]:
    """Draw random clips [B, S, 3, T, H, W] and spectrograms [B, 1, 1, frames, bands] for a batch."""
    clips: dict[str, Tensor] = {}
    if video is not None:
        clips["video"] = draw.normal(size, video.clips, 3, video.frames, video.crop, video.crop)
        clips["video_present"] = torch.ones(size, dtype=torch.bool)
    if audio is not None:
        clips["audio"] = draw.normal(size, 1, 1, audio.samples // audio.hop + 1, audio.mel_bins)
        clips["audio_present"] = torch.ones(size, dtype=torch.bool)
    return clips
