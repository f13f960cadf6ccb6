"""DCASE acoustic scenes: the data set of 2014, which audio-visual papers call DCASE."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common.data.datasets.base import (
    AUDIO_SUFFIXES,
    MediaDataset,
    Scan,
    WriteMedia,
    first_of,
    placeholder,
    prefix_of,
    put,
    walk,
)
from common.data.listing import DatasetError

_FOLDERS = {
    "train": ("scenes_stereo/scenes_stereo", "scenes_stereo"),
    "test": ("scenes_stereo_testset/scenes_stereo_testset", "scenes_stereo_testset"),
}
_NAME = re.compile(r"(.*?\D)(\d+)")


class DCASE2014(MediaDataset):
    """DCASE scene classification: 100 training and 100 test recordings of 30 s, ten scenes.

    The paper does not state the year. We use the IEEE AASP challenge (public part for training, private part for
    testing), which audio-visual papers call DCASE or DCASE 2014. No later year has one training list, one test list and
    ten classes.

    The scene is the file name without the number. In both splits, labels follow the alphabetical order of scenes.
    """

    name = "dcase2014"
    title = "DCASE scenes"
    splits = ("train", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "test"}
    num_classes = 10
    published_counts: ClassVar[Mapping[str, int]] = {"train": 100, "test": 100}
    streams = ("audio",)
    expected_layout = (
        "scenes_stereo/<scene><number>.wav                   (scenes_stereo.zip, public part: training)\n"
        "scenes_stereo_testset/<scene><number>.wav           (scenes_stereo_testset.zip, private part: test)"
    )
    size = "0.7 GB"
    license = "Creative Commons Attribution; see the notice in each archive"
    source = "https://dcase.community/challenge2013/task-acoustic-scene-classification"

    def _scan(self, split: str, fold: int | None) -> Scan:
        self._one_of(*_FOLDERS[split])
        folders = {part: first_of(self.root, names) for part, names in _FOLDERS.items()}
        scan = Scan((), "scenes_stereo/ and scenes_stereo_testset/, scene from the name")
        scenes: dict[str, dict[str, str]] = {}
        for part, folder in folders.items():
            if folder is not None:
                prefix = prefix_of(folder, self.root)
                names = walk(folder, AUDIO_SUFFIXES, scan.watched)
                scenes[part] = {prefix + name: _scene(folder / name, stem) for name, stem in names}
        scan.classes = tuple(sorted({scene for scene_of in scenes.values() for scene in scene_of.values()}))
        for name, scene in scenes[split].items():
            label = scan.classes.index(scene)
            scan.add(name, label=label, sound_label=label)
        return scan


def _scene(path: Path, stem: str) -> str:
    match = _NAME.fullmatch(stem)
    if match is None:
        raise DatasetError(f"{path}: expected a name of scene and number, such as bus01.wav")
    return match[1].rstrip("_- ")


def write_dcase(
    root: Path,
    scenes: Sequence[str] = ("bus", "park", "tube", "tubestation"),
    clips_per_scene: int = 2,
    write: WriteMedia = placeholder,
) -> Path:
    """Write the two folders of the published archives."""
    for folder in ("scenes_stereo", "scenes_stereo_testset"):
        for scene in scenes:
            for number in range(1, clips_per_scene + 1):
                put(root / folder / f"{scene}{number:02d}.wav", write)
    return root
