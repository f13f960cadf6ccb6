"""A miniature of video with sound, speech and text: clips of moving shapes, with questions and descriptions.

The texts name categories that a classifier of pictures or sounds can predict. If the classifier is trained on the
source domain (plain colors, little noise), it is better than chance but far from perfect on the target domain (tinted
colors, more noise, other pitches).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.datasets.base import write_lines
from common.data.datasets.esc50 import write_esc50
from common.data.worlds.audiovisual import write_clip, write_sound
from common.data.worlds.base import World, Write, arguments_of
from common.data.worlds.clip_generator import _bilinear_weights, _rms, _shaped_noise
from common.types import FrameSide, NonNegativeInt, PositiveFloat, PositiveInt, SampleRate

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
DIRECTIONS = ("left", "right", "up", "down")
TIMBRES = ("beep", "buzz", "hiss")
PITCHES = ("high", "low")
SPEAKERS = ("anna", "ben", "carla", "david", "emma")

#: Wording of each kind of question.
QUESTIONS = {
    "shape": "what shape is it ?",
    "color": "what color is it ?",
    "motion": "where does it move ?",
    "sound": "what do you hear ?",
    "pitch": "how does it sound ?",
    "speaker": "who speaks ?",
    "caption": "what happens ?",
}
_TURN_KINDS = tuple(QUESTIONS)
# Six ways to answer each kind of question.
_ANSWERS = {
    "shape": ("it is a {0}", "a {0}", "i see a {0}", "that is a {0}", "the shape is a {0}", "it looks like a {0}"),
    "color": ("it is {0}", "{0}", "i see {0}", "that is {0}", "the color is {0}", "it looks {0}"),
    "motion": ("it moves {0}", "{0}", "it goes {0}", "i see it move {0}", "the shape moves {0}", "that goes {0}"),
    "sound": ("it is a {0}", "a {0}", "i hear a {0}", "that is a {0}", "the sound is a {0}", "it sounds like a {0}"),
    "pitch": ("it sounds {0}", "{0}", "i hear it {0}", "that is {0}", "the sound is {0}", "it is {0}"),
    "speaker": ("it is {0}", "{0}", "i hear {0}", "that is {0}", "{0} speaks", "the speaker is {0}"),
    "caption": (
        "a {1} {0} moves {2} with a {4} {3}",
        "a {1} {0} goes {2} with a {4} {3}",
        "i see a {1} {0} move {2} and hear a {4} {3}",
        "the {1} {0} moves {2} with a {4} {3}",
        "with a {4} {3} a {1} {0} moves {2}",
        "there is a {4} {3} and a {1} {0} moves {2}",
    ),
}
_FIRST, _LAST = "who speaks first ?", "who speaks last ?"
# A question's five options are the true answer and others from here.
_OPTIONS = {
    "shape": (*SHAPES, "star", "cross"),
    "color": (*COLOURS, "white"),
    "motion": (*DIRECTIONS, "nowhere"),
    "speaker": SPEAKERS,
}
_HIDDEN = "__UNDISCLOSED__"

# Number of a split's random stream.
_SPLIT_NUMBERS = {
    "kinetics400/train": 1,
    "kinetics400/val": 2,
    "esc50": 3,
    "avsd/train": 4,
    "avsd/valid": 5,
    "avsd/test": 6,
    "tvqa/train": 7,
    "tvqa/val": 8,
    "tvqa/test_public": 9,
}
_COLOUR_VALUES = np.array([[0.9, 0.15, 0.15], [0.15, 0.75, 0.2], [0.2, 0.3, 0.95], [0.9, 0.85, 0.15]])
_STEPS = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])  # x points right, y down
_REFERENCE_SIZE = 24.0  # lengths below are in pixels of a 24 x 24 frame
# Independent random streams of one clip.
_PICTURE, _SOUND, _LATENT, _TEXT, _SECOND, _DESCRIPTIONS = range(6)
_FRAME_RATE = 3  # TVQA frames per second
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Domain:
    """How clips look and sound, apart from the content that the words of a `Scene` describe.

    Lengths are pixels of a 24 x 24 frame; pairs are the lowest and highest value. `tint` is half the range of the log
    gain per color channel, `background` and `pixel_noise` are standard deviations, `travel` is the distance moved in
    the whole clip, `low` and `high` are in hertz, `snr` is in decibels.
    """

    tint: float
    background: float
    pixel_noise: float
    opacity: tuple[float, float]
    radius: tuple[float, float]
    travel: tuple[float, float]
    low: tuple[float, float]
    high: tuple[float, float]
    snr: tuple[float, float]


SOURCE = Domain(
    tint=0.0,
    background=0.12,
    pixel_noise=0.02,
    opacity=(0.9, 1.0),
    radius=(5.5, 7.5),
    travel=(9.0, 12.0),
    low=(180.0, 320.0),
    high=(800.0, 1400.0),
    snr=(6.0, 15.0),
)
TARGET = Domain(
    tint=0.33,
    background=0.15,
    pixel_noise=0.055,
    opacity=(0.7, 0.95),
    radius=(4.8, 6.3),
    travel=(7.0, 10.0),
    low=(500.0, 750.0),
    high=(1300.0, 2100.0),
    snr=(2.0, 10.0),
)


@dataclass(frozen=True)
class Scene:
    """The content of a clip as words: picture, sound and speaker."""

    shape: str
    colour: str
    direction: str
    timbre: str
    pitch: str
    speaker: str

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Scene:
        """Draw every word uniformly and independently."""
        words = (SHAPES, COLOURS, DIRECTIONS, TIMBRES, PITCHES, SPEAKERS)
        return cls(*(choices[int(rng.integers(len(choices)))] for choices in words))

    @property
    def video_words(self) -> tuple[str, ...]:
        return self.shape, self.colour, self.direction

    @property
    def audio_category(self) -> str:
        return f"{self.pitch} {self.timbre}"

    def answers(self, kind: str) -> tuple[str, ...]:
        """Return the true answer in six wordings. Dialogues use the first."""
        words = (*self.video_words, self.timbre, self.pitch, self.speaker)
        # All other kinds of questions ask for a single word.
        named = words if kind == "caption" else (words[_TURN_KINDS.index(kind)],)
        return tuple(template.format(*named) for template in _ANSWERS[kind])

    def caption(self, omitted: int) -> str:
        """Describe the picture with two of color, shape and direction. `omitted` selects the sentence."""
        return (
            f"something {self.colour} moves {self.direction}",
            f"a {self.shape} moves {self.direction}",
            f"a {self.colour} {self.shape} moves",
        )[omitted]

    def summary(self, omitted: int) -> str:
        """Describe the sound with one of its two words."""
        return (f"one hears that it sounds {self.pitch}", f"one hears a {self.timbre}")[omitted]

    def descriptions(self, speaker: str) -> tuple[tuple[str, str], ...]:
        """Return four descriptions of a moment with their types: "v" for the picture, "vt" for picture and speech."""
        what = f"{self.colour} {self.shape}"
        return (
            (f"a {what} moves {self.direction}", "v"),
            (f"a {what} moves {self.direction} while {speaker} speaks", "vt"),
            (f"the {what} goes {self.direction}", "v"),
            (f"{speaker} speaks while a {what} moves {self.direction}", "vt"),
        )


def greeting(speaker: str) -> str:
    return f"hello i am {speaker}"


def kind_of(question: str) -> str:
    """Return the key of :data:`QUESTIONS` for a question of this world, or "" for any other text."""
    if question in (_FIRST, _LAST):
        return "speaker"
    return next((kind for kind, wording in QUESTIONS.items() if wording == question), "")


def sentences() -> tuple[str, ...]:
    """Return sentences that contain every word of this world's texts, to build a vocabulary."""
    texts: dict[str, None] = dict.fromkeys([*QUESTIONS.values(), _FIRST, _LAST])
    for scene in itertools.starmap(Scene, itertools.product(SHAPES, COLOURS, DIRECTIONS, TIMBRES, PITCHES, SPEAKERS)):
        for kind in QUESTIONS:
            texts.update(dict.fromkeys(scene.answers(kind)))
        texts.update(dict.fromkeys([*map(scene.caption, range(3)), *map(scene.summary, range(2))]))
        texts.update(dict.fromkeys(text for text, _ in scene.descriptions(scene.speaker)))
    texts.update(dict.fromkeys(map(greeting, SPEAKERS)))
    texts.update(dict.fromkeys(itertools.chain(*_OPTIONS.values())))
    return tuple(texts)


# -- pictures and sounds -----------------------------------------------------------------------------------------------


def render_frames(scene: Scene, domain: Domain, size: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the moving shape of a scene: uint8 [frames, size, size, 3]."""
    unit = size / _REFERENCE_SIZE
    cells = int(rng.integers(2, 4))
    weights = _bilinear_weights(cells, size)
    still = 0.5 + domain.background * np.einsum("yi,xj,ijc->yxc", weights, weights, rng.normal(size=(cells, cells, 3)))
    radius, travel = rng.uniform(*domain.radius) * unit, rng.uniform(*domain.travel) * unit
    step = _STEPS[DIRECTIONS.index(scene.direction)]
    # The path's midpoint can be anywhere across the path; along the path, the object must stay in the picture.
    along, across = max(size / 2 - travel / 2 - 0.6 * radius, 0.0), size / 2 - 0.9 * radius
    reach = np.where(step != 0, along, across)
    middle = size / 2 + rng.uniform(-1, 1, size=2) * reach
    way = np.linspace(-0.5, 0.5, frames)[:, None] * travel
    mask = _shape_mask(scene.shape, middle + way * step, radius, size)
    blend = rng.uniform(*domain.opacity) * mask[..., None]
    # Saturation and brightness of a color vary a little in both domains.
    colour = np.clip(_COLOUR_VALUES[COLOURS.index(scene.colour)] + rng.normal(0, 0.04, size=3), 0, 1)
    gain = np.exp(rng.uniform(-domain.tint, domain.tint, size=3))
    pixels = (still * (1 - blend) + colour * blend) * gain
    pixels += rng.normal(0, domain.pixel_noise, size=pixels.shape)
    return np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _shape_mask(shape: str, centers: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Return a shape's coverage of pixels [T, size, size], for `centers` [T, 2] in pixels. Edges are one pixel wide."""
    grid = np.arange(size) + 0.5
    dx = grid[None, None, :] - centers[:, 0, None, None]
    dy = grid[None, :, None] - centers[:, 1, None, None]
    if shape == "circle":
        outside = np.hypot(dx, dy) - radius
    elif shape == "square":
        outside = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius
    else:
        # The triangle points up, and its sides have slope two.
        outside = np.maximum(dy - 0.85 * radius, (2.0 * np.abs(dx) - dy - 1.1 * radius) / np.sqrt(5.0))
    return np.clip(0.5 - outside, 0.0, 1.0)


def render_sound(scene: Scene, domain: Domain, samples: int, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Synthesize the sound of a scene: float32 [samples] in [-1, 1]."""
    low, high = domain.high if scene.pitch == "high" else domain.low
    frequency = np.exp(rng.uniform(np.log(low), np.log(high)))
    times = np.arange(samples) / sample_rate
    angle = 2 * np.pi * frequency * times + rng.uniform(0, 2 * np.pi)
    spectrum = np.fft.rfftfreq(samples, 1 / sample_rate)
    if scene.timbre == "beep":
        signal = np.sin(angle)
    elif scene.timbre == "buzz":
        partials = np.arange(1, int(0.45 * sample_rate / frequency) + 1, 2)
        signal = np.sum([np.sin(partial * angle) / partial for partial in partials], axis=0)
    else:
        band = np.exp(-((np.log(np.maximum(spectrum, 1.0) / frequency) / 0.35) ** 2))
        beat = 0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(4.0, 8.0) * times + rng.uniform(0, 2 * np.pi))
        signal = _shaped_noise(rng, samples, band) * beat
    signal = signal / _rms(signal)
    knots = rng.normal(0, 0.7, size=7)
    position = np.linspace(0, 1, len(spectrum))
    noise = _shaped_noise(rng, samples, np.exp(np.interp(position, np.linspace(0, 1, 7), knots) - position))
    noise = noise * 10 ** (-rng.uniform(*domain.snr) / 20)
    gain = 0.25 * 10 ** (rng.uniform(-10, 0) / 20)
    return np.clip(gain * (signal + noise), -1, 1).astype(np.float32)


# -- the world ---------------------------------------------------------------------------------------------------------


class NarratedWorld(World):
    """Replaces Kinetics-400, ESC-50, AVSD, TVQA and TVC: moving shapes with a sound, a speaker and texts.

    Kinetics-400 and ESC-50 are the source domain, whose classes are the words of a clip ("red circle left",
    "high_beep"). AVSD, TVQA and TVC are the target domain. AVSD clips have picture and sound. A question in a dialogue
    is about the picture, the sound or the speech, which is in `subtitles.jsonl` in TVQA's format. TVQA clips are silent
    frames; one speaker talks in each half. TVC describes the halves of the TVQA clips. `words.jsonl` holds the true
    categories of every clip, which no real data set provides.

    Args:
        source_clips, source_clips_validation: numbers of silent clips, which cycle through all 48 classes.
        source_sounds_per_fold: recordings per class and fold; there are six classes and five folds.
        turns: questions per dialogue. Test dialogues have 1 to `turns` questions.
        moments, moments_validation, moments_test: numbers of TVQA clips, each with five questions and two moments for
            TVC.
        seconds, long_seconds: length of a clip with sound, and of a TVQA clip.
        size: side of a frame in pixels; even.
        fps: frames per second of the files with sound; TVQA frames have 3 per second.
    """

    kind = "narrated"
    title = "narrated world"
    names = ("kinetics400", "esc50", "avsd", "tvqa", "tvc")
    version = 2

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        source_clips: PositiveInt = 960,
        source_clips_validation: PositiveInt = 240,
        source_sounds_per_fold: PositiveInt = 32,
        dialogs: PositiveInt = 700,
        dialogs_validation: PositiveInt = 70,
        dialogs_test: PositiveInt = 560,
        turns: PositiveInt = 4,
        moments: PositiveInt = 400,
        moments_validation: PositiveInt = 120,
        moments_test: PositiveInt = 30,
        seconds: PositiveFloat = 1.5,
        long_seconds: PositiveFloat = 4.0,
        size: FrameSide = 24,
        fps: PositiveInt = 6,
        sample_rate: SampleRate = 8000,
        root: str | None = None,
    ) -> None:
        parameters = arguments_of(locals())
        if turns > len(_TURN_KINDS):
            raise ValueError(f"turns must be at most {len(_TURN_KINDS)}, one per kind of question; got {turns}")
        super().__init__(parameters, root)
        self.seed = seed
        self.turns = turns
        self.seconds = seconds
        self.long_seconds = long_seconds
        self.size = size
        self.fps = fps
        self.sample_rate = sample_rate

    def recipe(self) -> dict[str, object]:
        return {**super().recipe(), "source": asdict(SOURCE), "target": asdict(TARGET)}

    def prepare(self, names: Sequence[str] | None = None) -> None:
        wanted = self.names if names is None else tuple(names)
        # TVC needs TVQA, whose clips it describes.
        super().prepare(tuple(dict.fromkeys((*wanted, "tvqa"))) if "tvc" in wanted else wanted)

    def scene(self, split: str, index: int) -> Scene:
        """Return the content of clip number `index` in a target-domain split."""
        return Scene.drawn(self._rng(split, index, _LATENT))

    def second_speaker(self, split: str, index: int) -> str:
        """Return the speaker in the second half of a TVQA clip, who is not the speaker of the first half."""
        others = [name for name in SPEAKERS if name != self.scene(split, index).speaker]
        return others[int(self._rng(split, index, _SECOND).integers(len(others)))]

    def _rng(self, split: str, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _SPLIT_NUMBERS[split], index, stream])

    # -- source domain -------------------------------------------------------------------------------------------------

    def _fill_kinetics400(self, root: Path, write: Write) -> None:
        classes = list(itertools.product(SHAPES, COLOURS, DIRECTIONS))
        for folder, count in (("train", "source_clips"), ("val", "source_clips_validation")):
            split = f"kinetics400/{folder}"
            for index in range(self.parameters[count]):
                scene = Scene(*classes[index % len(classes)], TIMBRES[0], PITCHES[0], SPEAKERS[0])
                name = f"{folder}{index:0{11 - len(folder)}d}_{0:06d}_{max(1, round(self.seconds)):06d}.mp4"
                path = root / folder / " ".join((scene.colour, scene.shape, scene.direction)) / name
                write(path, partial(self._clip, path, scene, SOURCE, split, index, False))

    def _fill_esc50(self, root: Path, write: Write) -> None:
        scenes = [
            Scene(SHAPES[0], COLOURS[0], DIRECTIONS[0], *kind, SPEAKERS[0])
            for kind in itertools.product(TIMBRES, PITCHES)
        ]
        number = itertools.count()

        def sound(path: Path) -> None:
            index = next(number)
            write(path, partial(self._sound, path, scenes[index % len(scenes)], index))

        names, clips = [scene.audio_category for scene in scenes], self.parameters["source_sounds_per_fold"]
        write_esc50(root, names, clips, "\n", sound)

    # -- dialogues -----------------------------------------------------------------------------------------------------

    def _fill_avsd(self, root: Path, write: Write) -> None:
        speech: list[object] = []
        words: list[object] = []
        parts = (("train", "dialogs", "N"), ("valid", "dialogs_validation", "V"), ("test", "dialogs_test", "T"))
        for part, count, letter in parts:
            split, dialogs = f"avsd/{part}", []
            for index in range(self.parameters[count]):
                scene, clip = self.scene(split, index), f"{letter}{index:04d}"
                folder = "Charades_vu17_test_480" if part == "test" else "Charades_v1_480"
                path = root / folder / f"{clip}.mp4"
                write(path, partial(self._clip, path, scene, TARGET, split, index, True))
                dialogs.append(self._dialog(clip, scene, split, index))
                speech.append(_subtitles(clip, [(greeting(scene.speaker), 0.1, self.seconds - 0.1)]))
                words.append(_true_words(clip, scene))
            _write_json(root / f"{part}_set4DSTC7-AVSD.json", _dialog_document(part, dialogs))
            if part == "test":
                self._withhold(root, dialogs)
        _write_json(root / "subtitles.jsonl", *speech)
        _write_json(root / "words.jsonl", *words)

    def _dialog(self, clip: str, scene: Scene, split: str, index: int) -> dict[str, object]:
        rng = self._rng(split, index, _TEXT)
        if split == "avsd/test":
            # For each number of turns, every kind of question comes last equally often.
            last = _TURN_KINDS[index % len(_TURN_KINDS)]
            others = [kind for kind in rng.permutation(_TURN_KINDS).tolist() if kind != last]
            kinds = [*others[: index // len(_TURN_KINDS) % self.turns], last]
        else:
            kinds = rng.permutation(_TURN_KINDS).tolist()[: self.turns]
        return {
            "image_id": clip,
            "caption": scene.caption(int(rng.integers(3))),
            "summary": scene.summary(int(rng.integers(2))),
            "dialog": [{"question": QUESTIONS[kind], "answer": scene.answers(kind)[0]} for kind in kinds],
        }

    def _withhold(self, root: Path, dialogs: list[dict[str, object]]) -> None:
        """Move the last answers of the test split to two files: the original answers, and six references for each."""
        _write_json(
            root / "mock_test_set4DSTC10-AVSD_from_DSTC7_singref.json", _dialog_document("test answers", dialogs)
        )
        images: list[object] = []
        annotations: list[object] = []
        hidden: list[object] = []
        for index, dialog in enumerate(dialogs):
            turns = dialog["dialog"]
            assert isinstance(turns, list)
            images.append({"id": index + 1, "name": f"{dialog['image_id']}_{len(turns)}"})
            for text in self.scene("avsd/test", index).answers(kind_of(turns[-1]["question"])):
                annotations.append({"image_id": index + 1, "id": len(annotations) + 1, "caption": text})
            last = {**turns[-1], "answer": _HIDDEN}
            hidden.append({**dialog, "dialog": [*turns[:-1], last]})
        _write_json(
            root / "test_set4DSTC7-AVSD_multiref.json",
            {"info": {}, "licenses": [], "type": "captions", "images": images, "annotations": annotations},
        )
        _write_json(root / "test_set4DSTC7-AVSD.json", _dialog_document("test", hidden))

    # -- television ----------------------------------------------------------------------------------------------------

    def _long_clips(self) -> Iterator[tuple[str, str, int, str, str]]:
        """Yield split, part of the file names, number, name and show of each TVQA clip."""
        shows = ("The Big Bang Theory", "Castle", "Friends")
        for season, (part, count) in enumerate(
            (("train", "moments"), ("val", "moments_validation"), ("test_public", "moments_test")), start=1
        ):
            for index in range(self.parameters[count]):
                show = index % len(shows)
                # In the release, names of clips of the first show have no prefix.
                prefix = ("", "castle_", "friends_")[show]
                name = f"{prefix}s{season:02d}e{index // 30 + 1:02d}_seg{index % 2 + 1:02d}_clip_{index % 30:02d}"
                yield f"tvqa/{part}", part, index, name, shows[show]

    def _fill_tvqa(self, root: Path, write: Write) -> None:
        questions: dict[str, list[object]] = {}
        speech, words = [], []
        for split, part, index, clip, show in self._long_clips():
            scene, second = self.scene(split, index), self.second_speaker(split, index)
            folder = {"The Big Bang Theory": "bbt", "Castle": "castle", "Friends": "friends"}[show]
            path = root / "frames_hq" / f"{folder}_frames" / clip
            write(path, partial(self._frames, path, scene, split, index))
            listed = questions.setdefault(part, [])
            for record in self._questions(scene, second, self._rng(split, index, _TEXT)):
                hidden = {
                    name: value for name, value in record.items() if part != "test_public" or name != "answer_idx"
                }
                listed.append({**hidden, "qid": len(listed), "vid_name": clip, "show_name": show})
            middle, end = self.long_seconds / 2, self.long_seconds
            lines = [(greeting(scene.speaker), 0.2, middle - 0.2), (greeting(second), middle + 0.2, end - 0.2)]
            speech.append(_subtitles(clip, lines))
            words.append(_true_words(clip, scene, sound=False))
        for part, records in questions.items():
            _write_json(root / f"tvqa_{part}.jsonl", *records)
        _write_json(root / "tvqa_preprocessed_subtitles.jsonl", *speech)
        _write_json(root / "words.jsonl", *words)

    def _questions(self, scene: Scene, second: str, rng: np.random.Generator) -> Iterator[dict[str, object]]:
        end = self.long_seconds
        asked = (
            ("shape", QUESTIONS["shape"], scene.shape, f"0.0-{end:g}"),
            ("color", QUESTIONS["color"], scene.colour, f"0.0-{end:g}"),
            ("motion", QUESTIONS["motion"], scene.direction, "nan-nan"),
            ("speaker", _FIRST, scene.speaker, f"0.0-{end / 2:g}"),
            ("speaker", _LAST, second, f"{end / 2:g}-{end:g}"),
        )
        for kind, question, answer, span in asked:
            options = rng.permutation(_OPTIONS[kind]).tolist()
            named = {f"a{place}": option for place, option in enumerate(options)}
            yield {"q": question, **named, "answer_idx": options.index(answer), "ts": span}

    def _fill_tvc(self, root: Path, write: Write) -> None:
        moments: dict[str, list[object]] = {}
        for split, part, index, clip, _ in self._long_clips():
            scene = self.scene(split, index)
            rng = self._rng(split, index, _DESCRIPTIONS)
            middle, end = self.long_seconds / 2, self.long_seconds
            halves = ((scene.speaker, 0.0, middle), (self.second_speaker(split, index), middle, end))
            listed = moments.setdefault(part, [])
            for half, (speaker, first, last) in enumerate(halves):
                number = 2 * index + half
                record = {"vid_name": clip, "duration": end, "ts": [first, last], "clip_id": number}
                texts = scene.descriptions(speaker)
                if part == "train":
                    # Keep one description of the picture, and one of picture and speech.
                    texts = (texts[2 * int(rng.integers(2))], texts[1 + 2 * int(rng.integers(2))])
                if part != "test_public":
                    record["descs"] = [
                        {"desc": text, "desc_id": 4 * number + place, "type": kind, "from_retrieval": True}
                        for place, (text, kind) in enumerate(texts)
                    ]
                listed.append(record)
        for part, records in moments.items():
            _write_json(root / f"tvc_{part}_release.jsonl", *records)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _clip(self, path: Path, scene: Scene, domain: Domain, split: str, index: int, sound: bool) -> None:
        picture = self._rng(split, index, _PICTURE)
        frames = render_frames(scene, domain, self.size, round(self.seconds * self.fps), picture)
        if not sound:
            write_clip(path, frames, self.fps)
            return
        samples = round(self.seconds * self.sample_rate)
        heard = render_sound(scene, domain, samples, self.sample_rate, self._rng(split, index, _SOUND))
        write_clip(path, frames, self.fps, heard, self.sample_rate)

    def _sound(self, path: Path, scene: Scene, index: int) -> None:
        samples = round(self.seconds * self.sample_rate)
        rng = self._rng("esc50", index, _SOUND)
        write_sound(path, render_sound(scene, SOURCE, samples, self.sample_rate, rng), self.sample_rate)

    def _frames(self, path: Path, scene: Scene, split: str, index: int) -> None:
        path.mkdir()
        count = round(self.long_seconds * _FRAME_RATE)
        frames = render_frames(scene, TARGET, self.size, count, self._rng(split, index, _PICTURE))
        for number, pixels in enumerate(frames, start=1):
            # Use full color resolution, because objects are only ten pixels wide.
            Image.fromarray(pixels).save(path / f"{number:05d}.jpg", quality=_JPEG_QUALITY, subsampling=0)


def _subtitles(clip: str, lines: Sequence[tuple[str, float, float]]) -> dict[str, object]:
    return {
        "vid_name": clip,
        "sub": [{"text": text, "start": round(start, 3), "end": round(end, 3)} for text, start, end in lines],
    }


def _true_words(clip: str, scene: Scene, sound: bool = True) -> dict[str, object]:
    return {"vid_name": clip, "video": scene.video_words, "audio": (scene.audio_category,) if sound else ()}


def _dialog_document(part: str, dialogs: Sequence[object]) -> dict[str, object]:
    return {"type": part, "version": "1.0", "dialogs": dialogs}


def _write_json(path: Path, *documents: object) -> None:
    """Write a JSON document per line."""
    write_lines(path, map(json.dumps, documents))
