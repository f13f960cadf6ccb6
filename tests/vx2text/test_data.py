"""Test VX2TEXT's data modules: batches, seeds, clips without sound, broken clips, and each item once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from common.data.datasets.avsd import AVSD
from common.data.datasets.base import MediaDataset
from common.data.datasets.esc50 import ESC50
from common.data.datasets.kinetics import Kinetics400
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA
from common.data.listing import Clip
from common.data.media import MediaError
from common.data.worlds.narrated import COLOURS, DIRECTIONS, PITCHES, SHAPES, TIMBRES, NarratedWorld
from common.training.examples import RandomTensors
from papers.vx2text.clips import AudioInput, ClipReader, LogMel, VideoInput
from papers.vx2text.data import (
    CaptioningData,
    DialogData,
    QuestionAnsweringData,
    collate,
)
from papers.vx2text.miniature import CategoryData, class_marks
from papers.vx2text.prompt import PromptLimits, TextTokenizer
from papers.vx2text.true_words import noisy_words
from tests.data.media_factory import numbered_frames, tone, write_video, write_wav
from tests.data.text_layouts import (
    CLIPS,
    REFERENCES,
    question,
    write_avsd,
    write_json,
    write_tvc,
    write_tvqa,
)
from tests.protocols.parts import attached

VIDEO = VideoInput(fps=6.0, frames=6, clips=1, crop=24, resize=24)
FRAMES = VideoInput(fps=3.0, frames=6, clips=1, crop=24, resize=24)
AUDIO = AudioInput(sample_rate=8000, seconds=1.0, window=256, hop=250, mel_bins=32, low=50.0, high=4000.0)
LIMITS = PromptLimits(video_tokens=3, audio_tokens=2)
VIDEO_WORDS = (*SHAPES, *COLOURS, *DIRECTIONS)
NAMES = {"video": VIDEO_WORDS, "audio": tuple(f"{pitch} {timbre}" for timbre in TIMBRES for pitch in PITCHES)}
#: Arguments of the tasks without sound.
FRAMED: dict[str, Any] = {"video": FRAMES, "prompt": LIMITS, "batch_size": 4, "video_categories": VIDEO_WORDS}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> NarratedWorld:
    made = NarratedWorld(
        seed=1,
        source_clips=48,
        source_clips_validation=5,
        source_sounds_per_fold=1,
        dialogs=9,
        dialogs_validation=2,
        dialogs_test=7,
        moments=4,
        moments_validation=3,
        moments_test=1,
        root=str(tmp_path_factory.mktemp("worlds")),
    )
    made.prepare()
    return made


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(vocabulary_size=128)


def dialogs(world: NarratedWorld, tokenizer: TextTokenizer, **changes: Any) -> DialogData:
    settings = {"world": world, "video": VIDEO, "audio": AUDIO, "prompt": LIMITS, "batch_size": 4, "num_workers": 0}
    settings |= {f"{modality}_categories": names for modality, names in NAMES.items()}
    return DialogData(AVSD("unused"), tokenizer, **{**settings, **changes})


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(
        torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        for name, value in first.items()
    )


# -- batches -----------------------------------------------------------------------------------------------------------


def test_parts_of_the_prompt_can_be_left_out(world: NarratedWorld, tokenizer: TextTokenizer) -> None:
    def text(**changes: int) -> str:
        items = dialogs(world, tokenizer, prompt=PromptLimits(**changes)).items("train", True)
        return tokenizer.decode([number for number in items[3]["input_ids"] if number >= 0])

    whole = text()
    for name in ("speech", "caption", "history"):
        assert f" {name} : " in whole
        assert f" {name} : " not in text(**{name: 0})
    summary = dialogs(world, tokenizer, with_summary=True).items("train", True).examples[0].caption
    caption = dialogs(world, tokenizer).items("train", True).examples[0].caption
    assert summary.startswith(f"{caption} one hears")


@pytest.mark.parametrize(("modalities", "places"), [(["video"], [-1, -2, -3]), (["audio"], [-101, -102]), ([], [])])
def test_modalities_can_be_switched_off(
    world: NarratedWorld, tokenizer: TextTokenizer, modalities: list[Any], places: list[int]
) -> None:
    items = dialogs(world, tokenizer, modalities=modalities).items("train", True)
    batch = collate([items[0], items[5]])
    for name in ("video", "audio"):
        assert (name in batch) == (f"{name}_present" in batch) == (name in modalities)
    assert [number for number in batch["input_ids"][0].tolist() if number < 0] == places
    # The remaining inputs must equal those of a sample with all modalities.
    whole = dialogs(world, tokenizer).items("train", True)[0]
    for name in modalities:
        assert name == "audio" or torch.equal(batch[name][0], whole[name])
        assert name == "video" or torch.equal(batch[name][0], whole[name])


def test_a_batch_of_questions(world: NarratedWorld, tokenizer: TextTokenizer) -> None:
    data = attached(QuestionAnsweringData(TVQA("unused"), tokenizer, world=world, **FRAMED))
    assert data.modalities == ("video",)
    batch = next(iter(data.train_dataloader()))
    assert batch["video"].shape == (4, 1, 3, 6, 24, 24)
    assert "audio" not in batch
    assert batch["answer_options"].tolist() == [list(tokenizer.letter_ids)] * 4
    assert batch["labels"].shape == (4, 2)
    picked = batch["answer_options"].gather(1, batch["correct"][:, None])
    assert torch.equal(batch["labels"], torch.cat([picked, torch.ones_like(picked)], 1))
    for options_of, place, answer in zip(batch["options"], batch["correct"].tolist(), batch["answer_text"]):
        assert options_of[place] == answer
    assert batch["label"].tolist() == batch["correct"].tolist()
    assert len(list(data.test_dataloader().dataset)) == 15
    by_text = QuestionAnsweringData(TVQA("unused"), tokenizer, scoring="loglik", world=world, **FRAMED)
    batch = collate([by_text.items("val", False)[place] for place in range(3)])
    assert batch["option_labels"].shape == (3, 5, 2)
    assert "answer_options" not in batch
    for place in range(3):
        assert torch.equal(batch["labels"][place], batch["option_labels"][place, batch["correct"][place]])
    withheld = collate([by_text.items("test", False)[0]])
    assert withheld["labels"].tolist() == [[-100]]
    assert withheld["correct"].tolist() == [-1]
    assert withheld["references"] == [[]]


def test_speech_belongs_to_what_is_asked(world: NarratedWorld, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    moments = CaptioningData(TVC("unused"), tokenizer, world=world, video=FRAMES, prompt=LIMITS).items("val", False)
    for place in range(len(moments)):
        (line,) = moments.examples[place].speech
        assert line.split()[-1] in moments[place]["references"][1]
    write_tvqa(tmp_path, [question(0, CLIPS[0], ts="9.0-9.5")])
    items = QuestionAnsweringData(TVQA(tmp_path), tokenizer, video=FRAMES).items("val", False)
    assert items.examples[0].speech == ("Hello.", "(Kate:) Späť, now.")


def test_each_description_is_trained_on_and_all_are_references(
    world: NarratedWorld, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    data = CaptioningData(TVC("unused"), tokenizer, world=world, video=FRAMES, prompt=LIMITS)
    training, test = data.items("train", True), data.items("val", False)
    assert (len(training), len(test)) == (4 * 2 * 2, 3 * 2)
    first, second = training[0], training[1]
    assert first["references"] == second["references"] == [first["answer_text"], second["answer_text"]]
    assert test[0]["answer_text"] == test[0]["references"][0]
    assert len(test[0]["references"]) == 4
    assert first["question_text"] == ""
    hidden = collate([data.items("test", False)[0]])
    assert hidden["labels"].tolist() == [[-100]]
    assert hidden["references"] == [[]]
    write_tvqa(write_tvc(tmp_path))
    wide = VideoInput(fps=3.0, frames=3, clips=2, crop=8, resize=8)
    sample = CaptioningData(TVC(tmp_path, tmp_path), tokenizer, video=wide).items("train", False)[0]
    assert sample["video"].shape == (2, 3, 3, 8, 8)


def test_the_original_answer_comes_first_where_it_is_a_reference(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_avsd(tmp_path)
    data = DialogData(AVSD(tmp_path), tokenizer, video=VIDEO, audio=AUDIO)
    # The original answer is not among the references and is not added, so there are six references.
    items = data.items("test", False)
    assert len(items[0]["references"]) == 6
    assert items[0]["answer_text"] == "answer two"
    known = {
        "images": [{"id": 1, "name": "ZZZZ9_3"}, {"id": 2, "name": "CCCC3_1"}],
        "annotations": [
            {"image_id": number, "id": number * 10 + place, "caption": text}
            for number, own in ((1, "answer one"), (2, "answer two"))
            for place, text in enumerate(["another", own, "a third"])
        ],
    }
    write_json(tmp_path / REFERENCES, known)
    assert data.items("test", False)[0]["references"] == ["answer two", "another", "a third"]
    (tmp_path / REFERENCES).unlink()
    assert data.items("test", False)[0]["references"] == ["answer two"]
    write_avsd(tmp_path, answers=False)
    for path in tmp_path.glob("mock*"):
        path.unlink()
    sample = data.items("test", False)[0]
    assert (sample["references"], sample["answer_text"], sample["labels"]) == ([], "", [])


# -- words in place of modality tokens ---------------------------------------------------------------------------------


def test_words_are_replaced_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    rows = [noisy_words(("red", "circle", "left"), 3, VIDEO_WORDS, 0.15, rng) for _ in range(2000)]
    wrong = np.mean([word not in ("red", "circle", "left") for row in rows for word in row])
    assert wrong == pytest.approx(0.15 * 8 / 11, abs=0.015)
    assert noisy_words(("red",), 3, ("red",), 0.0, rng) == ["red"] * 3
    assert len(noisy_words(("red", "circle", "left"), 2, VIDEO_WORDS, 0.0, rng)) == 2
    assert noisy_words((), 2, (), 0.15, rng) == []
    assert noisy_words(("red",), 0, VIDEO_WORDS, 0.15, rng) == []


# -- classifiers -------------------------------------------------------------------------------------------------------


def categories(world: NarratedWorld, modality: str) -> CategoryData:
    dataset: MediaDataset = Kinetics400("unused") if modality == "video" else ESC50("unused")
    options: dict[str, Any] = {"world": world, "batch_size": 4, "num_workers": 0}
    if modality == "audio":
        options |= {"fold": 1, "test_split": "test"}
    return CategoryData(dataset, NAMES[modality], modality, video=VIDEO, audio=AUDIO, **options)


def test_classes_and_categories() -> None:
    classes = ["playing guitar", "red_Circle", "red", "playing_guitar"]
    marks = class_marks(classes, ["Playing Guitar", "red", "circle"])
    assert marks.int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 0]]
    assert class_marks(["crying_baby"], ["dog", "crying_baby"]).int().tolist() == [[0, 1]]
    with pytest.raises(ValueError, match=r"data\.categories lacks green"):
        class_marks(["green circle"], ["red", "circle"])


@pytest.mark.parametrize("task", ["question", "dialog", "caption", "video", "audio"])
def test_a_made_up_batch_has_the_shapes_of_a_real_one(
    task: str, world: NarratedWorld, tokenizer: TextTokenizer
) -> None:
    if task == "dialog":
        data: Any = dialogs(world, tokenizer)
    elif task in NAMES:
        data = categories(world, task)
    else:
        kind, dataset = {"question": (QuestionAnsweringData, TVQA), "caption": (CaptioningData, TVC)}[task]
        data = kind(dataset("unused"), tokenizer, **FRAMED, world=world, num_workers=0)
    made = data.example_batch(None, 4, RandomTensors())
    real = next(iter(attached(data).train_dataloader()))
    for name, value in made.batch.items():
        assert value.dtype == real[name].dtype, name
        if name == "input_ids":
            # The example has texts of the maximum length, with the same modality tokens.
            assert value.shape[1] >= real[name].shape[1]
            assert {int(n) for n in value[value < 0]} == {int(n) for n in real[name][real[name] < 0]}
        elif name != "labels":
            assert value.shape == real[name].shape, name
    assert made.batches is None or made.batches >= 1


# -- seeds, caches, workers --------------------------------------------------------------------------------------------


def test_samples_depend_on_seed_epoch_and_item_alone(world: NarratedWorld, tokenizer: TextTokenizer) -> None:
    items = dialogs(world, tokenizer).items("train", True)
    first = items[(2, 5)]
    items[(0, 1)]
    assert same(first, items[(2, 5)])
    assert same(first, dialogs(world, tokenizer).items("train", True)[(2, 5)])
    assert not torch.equal(first["video"], items[(3, 5)]["video"])
    assert not torch.equal(first["audio"], items[(3, 5)]["audio"])
    assert not torch.equal(first["video"], dialogs(world, tokenizer, seed=9).items("train", True)[(2, 5)]["video"])
    still = dialogs(world, tokenizer).items("train", False)
    assert torch.equal(still[(0, 5)]["video"], still[(3, 5)]["video"])


# -- what may be wrong with clips --------------------------------------------------------------------------------------


def test_a_clip_without_sound(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_avsd(tmp_path)
    data = DialogData(AVSD(tmp_path), tokenizer, video=VIDEO, audio=AUDIO, prompt=LIMITS)
    heard, silent = data.items("train", False)[0], data.items("test", False)[0]
    assert (bool(heard["audio_present"]), bool(silent["audio_present"])) == (True, False)
    assert silent["audio"].shape == heard["audio"].shape
    # Silence has the lowest level in all bands.
    assert silent["audio"].unique().tolist() == pytest.approx([-100.0])
    assert bool(silent["video_present"])
    # The text still contains the audio tokens, and the model leaves them out.
    assert {-101, -102} <= set(silent["input_ids"])
    batch = collate([heard, silent])
    assert batch["audio_present"].tolist() == [True, False]


# -- cutting -----------------------------------------------------------------------------------------------------------


def levels(clip: Tensor) -> list[float]:
    """Return the mean gray level of every frame of a normalized clip [3, T, H, W]."""
    return [round(float(frame.mean()) * 255) for frame in clip.transpose(0, 1)]


PLAIN = {"crop": 8, "resize": 8, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_clips_are_spread_over_the_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", fps=10.0, frames=numbered_frames(60, (16, 16)))
    video = VideoInput(fps=10.0, frames=5, clips=3, **PLAIN)  # type: ignore[arg-type]
    still = ClipReader(video, None, training=False).sample(Clip(path, -1), np.random.default_rng(0))["video"]
    assert still.shape == (3, 3, 5, 8, 8)
    # The starts cover 5.5 s in three equal parts. Clips start in the middle of a part: 5.5 / 6, 5.5 / 2, 5 * 5.5 / 6 s.
    starts = [round((levels(clip)[0] - 8) / 3) for clip in still]
    assert np.abs(np.array(starts) - [9, 27, 45]).max() <= 1
    assert all(levels(clip) == sorted(levels(clip)) for clip in still)
    begun = set()
    for seed in range(12):
        clips = ClipReader(video, None, training=True).sample(Clip(path, -1), np.random.default_rng(seed))["video"]
        firsts = [round((levels(clip)[0] - 8) / 3) for clip in clips]
        assert all(low - 1 <= first <= high + 1 for first, low, high in zip(firsts, (0, 18, 36), (19, 37, 55)))
        begun.add(firsts[0])
    assert len(begun) > 4


def test_limits_and_short_videos(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", fps=10.0, frames=numbered_frames(40, (16, 16)))
    reader = ClipReader(VideoInput(fps=10.0, frames=6, clips=2, **PLAIN), None, training=False)  # type: ignore[arg-type]
    clips = reader.sample(Clip(path, -1, start=2.0, end=2.3), np.random.default_rng(0))["video"]
    # The moment has only three frames, so they are repeated.
    for clip in clips:
        found = [round((level - 8) / 3) for level in levels(clip)]
        assert found == [20, 21, 22, 20, 21, 22]
    slow = ClipReader(VideoInput(fps=4.0, frames=2, clips=1, **PLAIN), None, training=False)  # type: ignore[arg-type]
    for start in (2.0, 2.05, 2.1):  # each moment is shorter than a frame
        moment = Clip(path, -1, start=start, end=start + 0.12)
        assert slow.sample(moment, np.random.default_rng(0))["video"].isfinite().all()
    with pytest.raises(MediaError, match="has no video within the listed limits"):
        reader.sample(Clip(path, -1, start=9.0, end=10.0), np.random.default_rng(0))
    with pytest.raises(MediaError):
        reader.sample(Clip(tmp_path / "absent.mp4", -1), np.random.default_rng(0))


def test_the_same_crop_for_all_clips_of_a_video(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), dtype=np.uint8).repeat(30, axis=0)
    path = write_video(tmp_path / "film.mkv", fps=10.0, frames=frames)
    video = VideoInput(fps=10.0, frames=2, clips=3, **{**PLAIN, "resize": 16})  # type: ignore[arg-type]
    for seed in range(3):
        clips = ClipReader(video, None, training=True).sample(Clip(path, -1), np.random.default_rng(seed))["video"]
        assert float((clips - clips[:1]).abs().mean()) < 0.02


def test_a_file_of_sound_alone(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "sound.wav", seconds=0.5, rate=8000, frequency=1000.0)
    sample = ClipReader(VIDEO, AUDIO, training=True).sample(Clip(path, -1), np.random.default_rng(0))
    assert not bool(sample["video_present"])
    assert bool(sample["audio_present"])
    black = (0.0 - torch.tensor(VIDEO.mean)) / torch.tensor(VIDEO.std)
    assert torch.allclose(sample["video"].amax(dim=(0, 2, 3, 4)), black)
    # The tone takes the first half of the window, and silence the second.
    loudness = sample["audio"][0, 0].amax(1)
    assert (loudness[:15] > -60).all()
    assert (loudness[18:] < -95).all()


def test_the_spectrogram_is_that_of_torchaudio() -> None:
    samples = torch.from_numpy(tone(1.0, 8000, 1000.0)[0])
    expected = torchaudio.transforms.MelSpectrogram(
        8000, n_fft=256, hop_length=250, f_min=50.0, f_max=4000.0, n_mels=32, norm="slaney", mel_scale="slaney"
    )(samples)
    (found,) = LogMel(AUDIO)([samples])
    assert found.shape == (1, 1, 33, 32)
    assert torch.allclose(found[0, 0].T, 10 * expected.clamp_min(1e-10).log10(), atol=1e-3)
    # PANNs use 64 bands up to 8 kHz, and 1,001 frames for a window of ten seconds.
    assert LogMel(AudioInput())([torch.zeros(10)])[0].shape == (1, 1, 1001, 64)
    assert torch.equal(LogMel(AUDIO)([torch.cat([samples, samples])])[0], found)
    sounds = [samples[: 100 * number] * (number % 3) for number in range(20)]
    for sound, one in zip(sounds, LogMel(AUDIO)(sounds), strict=True):
        assert torch.equal(one, LogMel(AUDIO)([sound])[0])
