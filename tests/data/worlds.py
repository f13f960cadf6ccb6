"""Small worlds for tests: one of each kind, and what their files hold."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from common.data.worlds.audiovisual import AudioVisualWorld
from common.data.worlds.base import World
from common.data.worlds.emoji import EmojiByDesigner, EmojiWorld
from common.data.worlds.emoji_languages import EmojiLanguagesWorld
from common.data.worlds.emoji_scenes import EmojiScenesWorld
from common.data.worlds.narrated import NarratedWorld
from common.data.worlds.shapes import ShapesWorld
from common.data.worlds.two_objects import COLOURS, SHAPES, TwoObjectsWorld
from common.data.worlds.two_sides import GROUNDS, TwoSidesWorld

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
    """A small world of a kind, not yet rendered."""
    arguments = {**TINY[kind], "root": None if root is None else str(root), **changes}
    return kind(**arguments)  # type: ignore[arg-type]


def digest(folder: Path, suffixes: set[str] | None = None) -> dict[str, str]:
    """Hash of each file below a folder, or of those with certain endings."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (suffixes is None or path.suffix in suffixes)
    }


def media(folder: Path) -> dict[str, str]:
    """Hash of each picture, film and sound below a folder."""
    return digest(folder, MEDIA)


def read_caption(text: str, kind: type[TwoSidesWorld] = TwoObjectsWorld) -> tuple[int, ...]:
    """Attributes that a caption of a world states, by another grammar than the world's."""
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
