"""Make a small world of each kind for tests, and check that its files equal those behind the recorded results.

Texts are compared byte by byte. Pictures, films and sounds are compared roughly, because encoders and CPUs round.
After raising a world's `version`, run `python -m tests.data.worlds` to write the golden values again.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.data.datasets.captioned import read_text
from common.data.listing import spread
from common.data.media import MediaFile
from common.data.worlds.audiovisual import AudioVisualWorld
from common.data.worlds.base import World
from common.data.worlds.emoji import EmojiByDesigner, EmojiWorld
from common.data.worlds.emoji_languages import EmojiLanguagesWorld
from common.data.worlds.emoji_scenes import EmojiScenesWorld
from common.data.worlds.narrated import NarratedWorld
from common.data.worlds.shapes import ShapesWorld
from common.data.worlds.two_objects import COLOURS, SHAPES, TwoObjectsWorld
from common.data.worlds.two_sides import GROUNDS, TwoSidesWorld

GOLDEN = Path(__file__).parents[1] / "golden" / "worlds.npz"
#: The number of files that are compared in a data set.
LOOKED_INTO = 12
#: Data sets of films, whose encoder rounds the most, and data sets of lossless files.
FILMS, LOSSLESS = {"kinetics400", "audioset", "ucf101", "hmdb51", "avsd"}, {"esc50", "dcase2014", "coco_2014"}
MEDIA = {".jpg", ".JPEG", ".png", ".mp4", ".avi", ".wav"}
TINY: dict[type[World], dict[str, Any]] = {
    AudioVisualWorld: {
        "seed": 5,
        "pretrain": 40,
        "validation": 20,
        "audioset": 40,
        "audioset_evaluation": 20,
        "ucf_groups": 4,
        "ucf_clips_per_group": 1,
        "hmdb_train": 2,
        "hmdb_test": 1,
        "esc_clips_per_fold": 1,
        "esc_seconds": 1.0,
        "dcase_train": 2,
        "dcase_test": 1,
        "dcase_seconds": 1.0,
    },
    EmojiWorld: {"seed": 5, "concepts": 40, "classes": 4},
    EmojiByDesigner: {"seed": 5, "concepts": 40, "classes": 4},
    EmojiLanguagesWorld: {
        "seed": 3,
        "size": 32,
        "concepts": 60,
        "test": 8,
        "fine_tune": 16,
        "pictures_per_drawing": 2,
        "vocabulary_size": 1000,
    },
    EmojiScenesWorld: {"seed": 3, "train": 40, "test": 24, "captions_per_image": 8},
    NarratedWorld: {
        "seed": 3,
        "source_clips": 48,
        "source_clips_validation": 6,
        "source_sounds_per_fold": 1,
        "dialogs": 12,
        "dialogs_validation": 3,
        "dialogs_test": 28,
        "moments": 4,
        "moments_validation": 3,
        "moments_test": 2,
    },
    ShapesWorld: {
        "seed": 5,
        "train": 32,
        "val": 16,
        "karpathy_train": 20,
        "karpathy_val": 6,
        "karpathy_test": 12,
        "probe_train": 48,
        "probe_test": 32,
        "voc_train": 40,
        "voc_test": 24,
    },
    TwoObjectsWorld: {"seed": 3, "train": 40, "test": 24, "captions_per_image": 8},
}


def tiny(kind: type[World], root: Path | None, **changes: Any) -> Any:
    """Make a small world, not yet rendered."""
    arguments = {**TINY[kind], "root": None if root is None else str(root), **changes}
    return kind(**arguments)  # type: ignore[arg-type]


def digest(folder: Path, suffixes: set[str] | None = None) -> dict[str, str]:
    """Hash each file in a folder, or only the files with the given suffixes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (suffixes is None or path.suffix in suffixes)
    }


def media(folder: Path) -> dict[str, str]:
    """Hash each picture, film and sound in a folder."""
    return digest(folder, MEDIA)


def read_caption(text: str, kind: type[TwoSidesWorld] = TwoObjectsWorld) -> tuple[int, ...]:
    """Parse the attributes from a caption, with a grammar written independently of the world's code."""
    names = [name for name, _ in kind.things]
    thing, ground = f"({'|'.join(names)})", rf" on (?:a )?({'|'.join(GROUNDS)})"
    placed = rf"(?:a {thing}(?: at)? (left|right)|(left|right) a {thing})"
    plain = re.fullmatch(f"{placed} and {placed}{ground}", text)
    said: dict[str, str] = {}
    if plain is not None:
        *groups, last = plain.groups()
        for own in (groups[:4], groups[4:]):
            said[own[1] or own[2]] = own[0] or own[3]
    else:
        related = re.fullmatch(rf"a {thing} (left|right) of a {thing}{ground}", text)
        assert related is not None, text
        said[related[2]] = related[1]
        said["left" if related[2] == "right" else "right"] = related[3]
        last = related[4]
    assert set(said) == {"left", "right"}
    numbers: list[int] = []
    for side in ("left", "right"):
        if kind is TwoObjectsWorld:
            colour, shape = said[side].split()
            numbers += [SHAPES.index(shape), list(COLOURS).index(colour)]
        else:
            numbers.append(names.index(said[side]))
    return (*numbers, list(GROUNDS).index(last))


def golden_of(world: World) -> dict[str, Any]:
    """Render a world. Return its folder, hashes of file names and texts, and summaries of some pictures and sounds."""
    world.prepare()
    held: dict[str, Any] = {world.kind: world.folder.name}
    for name in world.names:
        root = world.root_of(name)
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        # SentencePiece's model depends on how the CPU rounds.
        texts = ["" if path.suffix in {*MEDIA, ".model"} else read_text(path) for path in files]
        content = json.dumps([(path.relative_to(root).as_posix(), text) for path, text in zip(files, texts)])
        media = [path for path in files if path.suffix in MEDIA]
        looked = [alike(media[row]) for row in spread(len(media), LOOKED_INTO)]
        held[f"{world.kind}/{name}"] = hashlib.sha256(content.encode()).hexdigest()
        held[f"{world.kind}/{name}/media"] = np.array(looked, np.float32)
    return held


def alike(path: Path) -> list[float]:
    """Summarize a picture (or a film's first and last) as 4 x 4 colors, and a sound as decibels per band and time."""
    if path.suffix in (".jpg", ".JPEG", ".png"):
        return small(np.asarray(Image.open(path).convert("RGB")))
    found: list[float] = []
    with MediaFile(path) as media:
        if media.video_limits is not None:
            frames, _ = media.read_video(*media.video_limits, media.video_fps)
            found += [*small(frames[0].numpy()), *small(frames[-1].numpy())]
        if media.audio_limits is not None:
            samples = media.read_audio(0.0, 1.0, 8000).double().numpy()
            power = np.abs(np.fft.rfft(samples)[1:4001]).reshape(16, -1) ** 2
            loud = np.square(samples[: len(samples) // 8 * 8]).reshape(8, -1)
            found += (10 * np.log10(np.concatenate([power.mean(1), loud.mean(1)]) + 1e-6)).tolist()
    return found


def small(pixels: np.ndarray) -> list[float]:
    return np.asarray(Image.fromarray(pixels).resize((4, 4), Image.Resampling.BOX), np.float64).ravel().tolist()


def as_it_was(world: World) -> World:
    """Render a world of `TINY`, and check that it equals the golden values."""
    golden = np.load(GOLDEN)
    for key, value in golden_of(world).items():
        if key.endswith("/media"):
            name = key.split("/")[1]
            close = 1.5 if name in FILMS else 0.05 if name in LOSSLESS else 0.5
            np.testing.assert_allclose(value, golden[key], rtol=0, atol=close, err_msg=key)
        else:
            assert value == str(golden[key]), key
    return world


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        worlds = [golden_of(tiny(kind, Path(folder))) for kind in TINY]
        np.savez_compressed(GOLDEN, **{key: value for world in worlds for key, value in world.items()})


if __name__ == "__main__":
    main()
