"""A miniature for audio-visual pre-training: clips with sound, written as real media files."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import wave
from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from common.data.datasets.base import write_lines
from common.data.datasets.esc50 import write_esc50
from common.data.datasets.hmdb51 import write_hmdb51
from common.data.datasets.ucf101 import write_ucf101
from common.data.worlds.base import World, Write, arguments_of
from common.data.worlds.clip_generator import NUM_CLASSES, SOUND_CLASSES, VIDEO_CLASSES, ClipGenerator, Nuisance
from common.types import FrameSide, NonNegativeInt, PositiveFloat, PositiveInt, SampleRate

# Number of a split's random stream.
_SPLIT_NUMBERS = {
    "kinetics400/train": 1,
    "kinetics400/val": 2,
    "audioset/train": 3,
    "audioset/eval": 4,
    "ucf101": 5,
    "hmdb51": 6,
    "esc50": 7,
    "dcase2014/train": 8,
    "dcase2014/test": 9,
}
_HARDER_PICTURE = Nuisance(background_strength=0.14, pixel_noise=0.04, distractors=2)
_HARDER_SOUND = Nuisance(snr=(0.0, 8.0), hums=3)
_UCF_TEST_SHARE = 7 / 25  # each division of UCF-101 tests seven of its 25 groups

# Use full color resolution, because two classes differ by two-pixel stripes, and no B-frames, because .avi stores no
# decoding order. Measured on 40 clips: 33.6 dB PSNR, 9 kB per two seconds.
_VIDEO_OPTIONS = {
    "crf": "14",
    "preset": "superfast",
    "x264-params": "rc-lookahead=0:sync-lookahead=0:bframes=0:threads=1",
}
_AUDIO_OPTIONS = {"aac_coder": "fast"}


class AudioVisualWorld(World):
    """Stand-ins for Kinetics-400, AudioSet, UCF-101, HMDB-51, ESC-50 and DCASE: 20 classes of moving shapes with sound.

    `common.data.worlds.clip_generator` defines the classes and cues. Splits are independent: no clip of an evaluation
    occurs in pre-training. HMDB-51's pictures are harder than UCF-101's, and DCASE's sounds are noisier than ESC-50's.

    Args:
        ucf_groups: groups per class of UCF-101. A division uses about 7 in 25 groups for testing.
        hmdb_train, hmdb_test: clips per class and division of HMDB-51.
        esc_clips_per_fold: recordings per class and fold of ESC-50.
        dcase_train, dcase_test: recordings per class of DCASE.
        size: side of a frame in pixels; even.
    """

    kind = "audiovisual"
    title = "audio-visual world"
    names = ("kinetics400", "audioset", "ucf101", "hmdb51", "esc50", "dcase2014")
    version = 4

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        pretrain: PositiveInt = 1024,
        validation: PositiveInt = 480,
        audioset: PositiveInt = 1536,
        audioset_evaluation: PositiveInt = 240,
        ucf_groups: PositiveInt = 25,
        ucf_clips_per_group: PositiveInt = 3,
        hmdb_train: PositiveInt = 25,
        hmdb_test: PositiveInt = 20,
        esc_clips_per_fold: PositiveInt = 5,
        esc_seconds: PositiveFloat = 5.0,
        dcase_train: PositiveInt = 10,
        dcase_test: PositiveInt = 10,
        dcase_seconds: PositiveFloat = 6.0,
        seconds: PositiveFloat = 2.0,
        size: FrameSide = 24,
        fps: PositiveInt = 8,
        sample_rate: SampleRate = 8000,
        root: str | None = None,
    ) -> None:
        parameters = arguments_of(locals())
        if ucf_groups < 4:
            raise ValueError(f"ucf_groups must be at least 4: three to test on and one to train on; got {ucf_groups}")
        super().__init__(parameters, root)
        self.seed = seed
        self.seconds = seconds
        self._generator = ClipGenerator(seed, size, fps, sample_rate)

    def recipe(self) -> dict[str, Any]:
        return {
            **super().recipe(),
            "nuisance": asdict(self._generator.nuisance),
            "harder": [asdict(_HARDER_PICTURE), asdict(_HARDER_SOUND)],
            "video": _VIDEO_OPTIONS,
            "audio": _AUDIO_OPTIONS,
        }

    # -- layouts -------------------------------------------------------------------------------------------------------

    def _fill_kinetics400(self, root: Path, write: Write) -> None:
        for split, count in (("train", self.parameters["pretrain"]), ("val", self.parameters["validation"])):
            number = _SPLIT_NUMBERS[f"kinetics400/{split}"]
            for index in range(count):
                begin, end = self._position_in_source(index)
                name = f"{_video_id(self.seed, number, index)}_{begin:06d}_{end:06d}.mp4"
                path = root / split / VIDEO_CLASSES[self._generator.label(index)] / name
                write(path, partial(self._clip, path, number, index))

    def _fill_audioset(self, root: Path, write: Write) -> None:
        identifiers = [f"/m/0{number:02d}toy" for number in range(NUM_CLASSES)]
        rows = (f"{n},{mid},{name}" for n, (mid, name) in enumerate(zip(identifiers, SOUND_CLASSES)))
        write_lines(root / "class_labels_indices.csv", ["index,mid,display_name", *rows], "\r\n")
        for split, list_name, count in (
            ("train", "unbalanced_train_segments", self.parameters["audioset"]),
            ("eval", "eval_segments", self.parameters["audioset_evaluation"]),
        ):
            number = _SPLIT_NUMBERS[f"audioset/{split}"]
            lines = ["# Segments of the audio-visual world", f"# num_ytids={count}, num_segs={count}"]
            lines.append("# YTID, start_seconds, end_seconds, positive_labels")
            for index in range(count):
                begin, end = self._position_in_source(index)
                video = _video_id(self.seed, number, index)
                label = identifiers[self._generator.label(index)]
                lines.append(f'{video}, {begin}.000, {end}.000, "{label}"')
                path = root / list_name / f"{video}_{begin}_{end}.mp4"
                write(path, partial(self._clip, path, number, index))
            write_lines(root / f"{list_name}.csv", lines)

    def _fill_ucf101(self, root: Path, write: Write) -> None:
        groups, classes = self.parameters["ucf_groups"], [name.title().replace(" ", "") for name in VIDEO_CLASSES]
        clips, tested = self.parameters["ucf_clips_per_group"], max(1, round(groups * _UCF_TEST_SHARE))
        silent = self._silent_clips(write, self._generator, "ucf101")
        write_ucf101(root, classes, groups, clips, tested, "\n", silent)

    def _fill_hmdb51(self, root: Path, write: Write) -> None:
        train, test = self.parameters["hmdb_train"], self.parameters["hmdb_test"]
        classes, name = [name.replace(" ", "_") for name in VIDEO_CLASSES], "world_{name}_u_cm_np1_fr_goo_{number}.avi"
        clips = max(3 * test, train + test)  # the three divisions must test on different clips
        silent = self._silent_clips(write, replace(self._generator, nuisance=_HARDER_PICTURE), "hmdb51")
        write_hmdb51(root, classes, clips, train, test, name, write=silent)

    def _fill_esc50(self, root: Path, write: Write) -> None:
        number, seconds = itertools.count(), self.parameters["esc_seconds"]

        def sound(path: Path) -> None:
            write(path, partial(self._sound, path, self._generator, _SPLIT_NUMBERS["esc50"], next(number), seconds))

        write_esc50(root, SOUND_CLASSES, self.parameters["esc_clips_per_fold"], write=sound)

    def _fill_dcase2014(self, root: Path, write: Write) -> None:
        generator = replace(self._generator, nuisance=_HARDER_SOUND)
        seconds = self.parameters["dcase_seconds"]
        for split, folder in (("train", "scenes_stereo"), ("test", "scenes_stereo_testset")):
            number = _SPLIT_NUMBERS[f"dcase2014/{split}"]
            for recording in range(self.parameters[f"dcase_{split}"]):
                for label, name in enumerate(SOUND_CLASSES):
                    index = recording * NUM_CLASSES + label
                    path = root / folder / f"{name.replace(' ', '_')}{recording + 1:02d}.wav"
                    write(path, partial(self._sound, path, generator, number, index, seconds))

    # -- files ---------------------------------------------------------------------------------------------------------

    def _position_in_source(self, index: int) -> tuple[int, int]:
        """Return the first and last second of a clip in a made-up source video. They only appear in file names."""
        begin = index * 37 % 290
        return begin, begin + max(1, round(self.seconds))

    def _clip(self, path: Path, split: int, index: int) -> None:
        generator = self._generator
        frames = generator.video(split, index, self.seconds)
        write_clip(path, frames, generator.fps, generator.audio(split, index, self.seconds), generator.sample_rate)

    def _silent_clips(self, write: Write, generator: ClipGenerator, split: str) -> Callable[[Path], None]:
        number = itertools.count()

        def silent(path: Path, index: int) -> None:
            write_clip(path, generator.video(_SPLIT_NUMBERS[split], index, self.seconds), generator.fps)

        return lambda path: write(path, partial(silent, path, next(number)))

    def _sound(self, path: Path, generator: ClipGenerator, split: int, index: int, seconds: float) -> None:
        write_sound(path, generator.audio(split, index, seconds), generator.sample_rate)


def write_clip(
    path: Path, frames: np.ndarray, fps: int, samples: np.ndarray | None = None, sample_rate: int | None = None
) -> None:
    """Write uint8 [T, H, W, 3] as H.264, and samples [S] in [-1, 1] as AAC. The suffix selects the container."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options=_VIDEO_OPTIONS)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv444p"
        audio = None
        if samples is not None and sample_rate is not None:
            audio = container.add_stream("aac", rate=sample_rate, layout="mono", options=_AUDIO_OPTIONS)
            audio.bit_rate = 4 * sample_rate
        for position, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = position, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and samples is not None and sample_rate is not None:
            sound = av.AudioFrame.from_ndarray(_quantized(samples)[None], format="s16", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = sample_rate, 0, Fraction(1, sample_rate)
            container.mux(audio.encode(sound))
            container.mux(audio.encode(None))


def write_sound(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write mono samples [S] in [-1, 1] as a 16-bit .wav file."""
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(sample_rate)
        stream.writeframes(_quantized(samples).astype("<i2").tobytes())


def _quantized(samples: np.ndarray) -> np.ndarray:
    return np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)


def _video_id(*numbers: int) -> str:
    digest = hashlib.sha256(json.dumps(numbers).encode()).digest()
    return base64.urlsafe_b64encode(digest[:9]).decode()[:11]
