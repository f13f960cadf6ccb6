"""The audio-visual world on disk: real files in real layouts, rendered once and only once."""

import hashlib
import multiprocessing
from pathlib import Path

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
from common.data.worlds.clip_generator import SOUND_CLASSES, VIDEO_CLASSES, ClipGenerator

TINY = {
    "pretrain": 24,
    "validation": 12,
    "audioset": 24,
    "audioset_evaluation": 12,
    "ucf_groups": 4,
    "ucf_clips_per_group": 1,
    "hmdb_train": 2,
    "hmdb_test": 1,
    "esc_clips_per_fold": 1,
    "esc_seconds": 1.0,
    "dcase_train": 2,
    "dcase_test": 1,
    "dcase_seconds": 1.0,
}


def tiny(root: Path, **changes: int) -> AudioVisualWorld:
    return AudioVisualWorld(**{"seed": 5, "root": str(root), **TINY, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AudioVisualWorld:
    made = tiny(tmp_path_factory.mktemp("worlds"))
    made.prepare()
    return made


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_kinetics(world: AudioVisualWorld) -> None:
    dataset = Kinetics400(world.root_of("kinetics400"))
    for split, count in (("train", 24), ("validation", 12)):
        listing = dataset.listing(split)
        assert len(listing) == count
        assert set(listing.classes) == set(VIDEO_CLASSES)
        assert np.bincount(listing.labels).tolist() == [count // 12] * 12
    stem = Path(dataset.listing("train").table.name(0)).stem
    identifier, begin, end = stem[:11], *stem[12:].split("_")
    assert len(identifier) == 11
    assert (len(begin), len(end)) == (6, 6)


def test_audioset(world: AudioVisualWorld) -> None:
    dataset = AudioSet(world.root_of("audioset"))
    listing = dataset.listing("unbalanced_train")
    assert (len(listing), listing.missing) == (24, 0)
    assert listing.classes == SOUND_CLASSES
    assert len(dataset.listing("evaluation")) == 12


def test_ucf(world: AudioVisualWorld) -> None:
    dataset = UCF101(world.root_of("ucf101"))
    tested: list[str] = []
    for fold in (1, 2, 3):
        train, test = dataset.listing("train", fold), dataset.listing("test", fold)
        assert (train.missing, test.missing) == (0, 0)
        assert (len(train), len(test)) == (36, 12)
        assert not set(train.table.names()) & set(test.table.names())
        assert np.bincount(test.labels).tolist() == [1] * 12
        tested += test.table.names()
    assert len(set(tested)) == len(tested)


def test_hmdb(world: AudioVisualWorld) -> None:
    dataset = HMDB51(world.root_of("hmdb51"))
    for fold in (1, 2, 3):
        train, test = dataset.listing("train", fold), dataset.listing("test", fold)
        assert (train.missing, test.missing) == (0, 0)
        assert np.bincount(train.labels).tolist() == [2] * 12
        assert np.bincount(test.labels).tolist() == [1] * 12
        assert not set(train.table.names()) & set(test.table.names())


def test_esc(world: AudioVisualWorld) -> None:
    listing = ESC50(world.root_of("esc50")).listing("all")
    assert (len(listing), listing.missing) == (60, 0)
    assert np.bincount(listing.folds).tolist() == [0] + [12] * 5
    assert [name.replace("_", " ") for name in listing.classes] == list(SOUND_CLASSES)


def test_dcase(world: AudioVisualWorld) -> None:
    dataset = DCASE2014(world.root_of("dcase2014"))
    train, test = dataset.listing("train"), dataset.listing("test")
    assert (len(train), len(test)) == (24, 12)
    assert len(train.classes) == 12
    assert train.classes == test.classes


def test_labels_name_what_the_generator_drew(world: AudioVisualWorld) -> None:
    """The class folder of a file is the class of the clip in it, in picture and sound."""
    listing = Kinetics400(world.root_of("kinetics400")).listing("train")
    generator = ClipGenerator(5)
    rendered = np.stack([generator.video(1, index, 2.0) for index in range(24)]).astype(float)
    for clip in listing.clips:
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
    for index in range(12):
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


def test_the_same_parameters_give_the_same_files(world: AudioVisualWorld, tmp_path: Path) -> None:
    again = tiny(tmp_path)
    assert again.key() == world.key()
    again.prepare(["esc50", "hmdb51"])
    for name in ("esc50", "hmdb51"):
        assert digest(again.root_of(name)) == digest(world.root_of(name))
    assert not again.root_of("kinetics400").exists()


def test_other_parameters_give_another_folder(world: AudioVisualWorld, tmp_path: Path) -> None:
    assert tiny(tmp_path, seed=6).folder.name != world.folder.name
    assert tiny(tmp_path, pretrain=36).folder.name != world.folder.name
    assert tiny(tmp_path).folder.name == world.folder.name


def test_splits_share_no_clip(world: AudioVisualWorld) -> None:
    hashes = [value for name in world.names for key, value in digest(world.root_of(name)).items() if "." in key]
    media = hashes
    assert len(set(media)) == len(media)


def test_a_second_call_leaves_the_files_alone(world: AudioVisualWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(AudioVisualWorld, "_render", never)
    world.prepare()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tiny(tmp_path)
    monkeypatch.setattr(audiovisual, "write_sound", _full_disk)
    with pytest.raises(OSError, match="no space"):
        world.prepare(["esc50"])
    assert not world.root_of("esc50").exists()
    assert not list(world.folder.glob(".rendering-*"))
    monkeypatch.undo()
    world.prepare(["esc50"])
    assert len(ESC50(world.root_of("esc50")).listing("all")) == 60


def _full_disk(*_: object) -> None:
    raise OSError("no space left on device")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    world = tiny(tmp_path)
    half = world.folder / ".rendering-half"
    half.mkdir(parents=True)
    (half / "part.wav").write_bytes(b"")
    world.prepare(["esc50"])
    assert not half.exists()


def _prepare(root: str) -> None:
    tiny(Path(root)).prepare(["esc50", "hmdb51"])


def test_two_processes_at_once(world: AudioVisualWorld, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_prepare, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    twin = tiny(tmp_path)
    for name in ("esc50", "hmdb51"):
        assert digest(twin.root_of(name)) == digest(world.root_of(name))
    assert not list(twin.folder.glob(".rendering-*"))


def test_unknown_names_and_bad_sizes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'kinetics'; it has kinetics400"):
        tiny(tmp_path).root_of("kinetics")
    with pytest.raises(ValueError, match="size"):
        tiny(tmp_path, size=23)
    with pytest.raises(ValueError, match="pretrain"):
        tiny(tmp_path, pretrain=0)
    with pytest.raises(ValueError, match="ucf_groups"):
        tiny(tmp_path, ucf_groups=3)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path))
    assert AudioVisualWorld().root_of("esc50").is_relative_to(tmp_path / "worlds")
