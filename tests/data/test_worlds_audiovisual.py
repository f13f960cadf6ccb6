"""The audio-visual world on disk: real files in real layouts, read by the classes of the real data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from common.data.datasets.audioset import AudioSet
from common.data.datasets.dcase import DCASE2014
from common.data.datasets.esc50 import ESC50
from common.data.datasets.hmdb51 import HMDB51
from common.data.datasets.kinetics import Kinetics400
from common.data.datasets.ucf101 import UCF101
from common.data.worlds import audiovisual
from common.data.worlds.audiovisual import AudioVisualWorld
from common.data.worlds.base import World
from common.data.worlds.clip_generator import SOUND_CLASSES, VIDEO_CLASSES, ClipGenerator


@pytest.fixture(scope="module")
def world(rendered: Callable[[type[World]], Any]) -> AudioVisualWorld:
    return rendered(AudioVisualWorld)


def test_kinetics(world: AudioVisualWorld) -> None:
    dataset = Kinetics400(world.root_of("kinetics400"))
    for split, count in (("train", 40), ("validation", 20)):
        listing = dataset.listing(split)
        assert len(listing) == count
        assert set(listing.classes) == set(VIDEO_CLASSES)
        assert np.bincount(listing.labels).tolist() == [count // 20] * 20
    stem = Path(dataset.listing("train").names[0]).stem
    identifier, begin, end = stem[:11], *stem[12:].split("_")
    assert len(identifier) == 11
    assert (len(begin), len(end)) == (6, 6)


def test_audioset(world: AudioVisualWorld) -> None:
    dataset = AudioSet(world.root_of("audioset"))
    listing = dataset.listing("unbalanced_train")
    assert (len(listing), listing.missing) == (40, 0)
    assert listing.classes == SOUND_CLASSES
    assert len(dataset.listing("evaluation")) == 20


def test_ucf(world: AudioVisualWorld) -> None:
    dataset = UCF101(world.root_of("ucf101"))
    tested: list[str] = []
    for fold in (1, 2, 3):
        train, test = dataset.listing("train", fold), dataset.listing("test", fold)
        assert (train.missing, test.missing) == (0, 0)
        assert (len(train), len(test)) == (60, 20)
        assert not set(train.names) & set(test.names)
        assert np.bincount(test.labels).tolist() == [1] * 20
        tested += test.names
    assert len(set(tested)) == len(tested)


def test_hmdb(world: AudioVisualWorld) -> None:
    dataset = HMDB51(world.root_of("hmdb51"))
    for fold in (1, 2, 3):
        train, test = dataset.listing("train", fold), dataset.listing("test", fold)
        assert (train.missing, test.missing) == (0, 0)
        assert np.bincount(train.labels).tolist() == [2] * 20
        assert np.bincount(test.labels).tolist() == [1] * 20
        assert not set(train.names) & set(test.names)


def test_esc(world: AudioVisualWorld) -> None:
    listing = ESC50(world.root_of("esc50")).listing("all")
    assert (len(listing), listing.missing) == (100, 0)
    assert np.bincount(listing.numbers["fold"]).tolist() == [0] + [20] * 5
    assert [name.replace("_", " ") for name in listing.classes] == list(SOUND_CLASSES)


def test_dcase(world: AudioVisualWorld) -> None:
    dataset = DCASE2014(world.root_of("dcase2014"))
    train, test = dataset.listing("train"), dataset.listing("test")
    assert (len(train), len(test)) == (40, 20)
    assert len(train.classes) == 20
    assert train.classes == test.classes


def test_labels_name_what_the_generator_drew(world: AudioVisualWorld) -> None:
    """The class folder of a file is the class of the clip in it, in picture and sound."""
    listing = Kinetics400(world.root_of("kinetics400")).listing("train")
    generator = ClipGenerator(5)
    rendered = np.stack([generator.video(1, index, 2.0) for index in range(40)]).astype(float)
    for clip in listing:
        frames, _ = decode(clip.path)
        index = int(np.abs(rendered - frames).mean(axis=(1, 2, 3, 4)).argmin())
        assert VIDEO_CLASSES[generator.label(index)] == clip.path.parent.name == listing.classes[clip.label]


def decode(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    samples = None
    with av.open(str(path)) as container:
        if container.streams.audio:
            samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    return frames, samples


def test_codecs_keep_picture_and_sound(tmp_path: Path) -> None:
    generator = ClipGenerator(0)
    for index in range(20):
        frames, samples = generator.video(1, index, 2.0), generator.audio(1, index, 2.0)
        path = tmp_path / f"{index}.mp4"
        audiovisual.write_clip(path, frames, 8, samples, 8000)
        seen, heard = decode(path)
        assert seen.shape == frames.shape
        error = np.mean((seen.astype(float) - frames) ** 2)
        assert 10 * np.log10(255**2 / error) > 30
        assert heard is not None
        assert len(heard) >= len(samples)
        noise = np.mean((heard[: len(samples)] - samples) ** 2)
        assert 10 * np.log10(np.mean(samples**2) / noise) > 14
        assert path.stat().st_size < 40_000


def test_silent_files_have_no_audio_stream(world: AudioVisualWorld) -> None:
    path = next(world.root_of("ucf101").rglob("*.avi"))
    frames, samples = decode(path)
    assert frames.shape == (16, 24, 24, 3)
    assert samples is None
