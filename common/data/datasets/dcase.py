"""DCASE acoustic scenes: the set that audio-visual papers call DCASE (2014)."""

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
    read_lines,
    walk,
    write_lines,
)
from common.data.listing import DatasetError

_FOLDERS = {
    "train": ("scenes_stereo/scenes_stereo", "scenes_stereo"),
    "test": ("scenes_stereo_testset/scenes_stereo_testset", "scenes_stereo_testset"),
}
_LIST_FOLDERS = ("", "evaluation_setup/", "lists/")
# Folders that names in a list may be relative to.
_BASES = ("", "audio/", "scenes_stereo/", "scenes_stereo_testset/")
_NAME = re.compile(r"(.*?\D)(\d+)")


class DCASE2014(MediaDataset):
    """DCASE scene classification: 100 training and 100 test recordings of 30 s, ten scenes.

    The paper does not state the year. We use the IEEE AASP challenge (public part for training, private part for
    testing), which audio-visual papers call DCASE or DCASE 2014; one training list, one test list and ten classes fit
    no later year.

    Two layouts are read:

    - *lists*: ``train.txt`` and ``test.txt`` (here or in ``evaluation_setup/``), one ``<path><TAB><scene>`` per line,
      with paths from the root (or from ``audio/``).
    - *two folders*, as in the published archives: ``scenes_stereo/bus01.wav`` ... for training and
      ``scenes_stereo_testset/bus01.wav`` ... for testing; the scene is the name without its number.

    Scenes are numbered in alphabetical order over both splits.
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
        "scenes_stereo_testset/<scene><number>.wav           (scenes_stereo_testset.zip, private part: test)\n"
        "or\n"
        "train.txt and test.txt: <path to a recording><TAB><scene>   (here or in evaluation_setup/)"
    )
    size = "0.7 GB"
    license = "Creative Commons Attribution; see the notice in each archive"
    source = "https://dcase.community/challenge2013/task-acoustic-scene-classification"

    def _scan(self, split: str, fold: int | None) -> Scan:
        lists = {part: first_of(self.root, (f"{folder}{part}.txt" for folder in _LIST_FOLDERS)) for part in self.splits}
        own_list = lists[split]
        watched: list[Path] = []
        if own_list is not None:
            layout = f"lists {own_list.relative_to(self.root)}"
            rows = {part: self._from_list(path, watched) for part, path in lists.items() if path is not None}
        else:
            self._one_of(*_FOLDERS[split])
            layout = "scenes_stereo/ and scenes_stereo_testset/, scene from the name"
            folders = {part: first_of(self.root, names) for part, names in _FOLDERS.items()}
            rows = {part: self._from_names(folder, watched) for part, folder in folders.items() if folder is not None}
        classes = tuple(sorted({scene for part in rows.values() for _, _, scene in part}))
        scan = Scan(classes, layout, watched)
        for found, listed, scene in rows[split]:
            scan.add(found, listed, label=classes.index(scene), sound_label=classes.index(scene))
        return scan

    def _from_list(self, path: Path, watched: list[Path]) -> list[tuple[str | None, str, str]]:
        """File, name in the list, and scene of each line."""
        watched += [path, path.parent]
        rows: list[tuple[str | None, str, str]] = []
        for line in read_lines(path):
            name, _, scene = (
                part.strip() for part in line.replace("\\", "/").rpartition("\t" if "\t" in line else " ")
            )
            if not name:
                raise DatasetError(f"{path}: expected `<path><TAB><scene>`, found {line!r}")
            found = first_of(self.root, (base + name for base in _BASES))
            # Moving or removing a recording changes its folder.
            watched.append((found or self.root / name).parent)
            rows.append((None if found is None else found.relative_to(self.root).as_posix(), name, scene))
        return rows

    def _from_names(self, folder: Path, watched: list[Path]) -> list[tuple[str | None, str, str]]:
        rows: list[tuple[str | None, str, str]] = []
        for name, stem in walk(folder, AUDIO_SUFFIXES, watched):
            match = _NAME.fullmatch(stem)
            if match is None:
                raise DatasetError(
                    f"{folder / name}: expected a name such as bus01.wav; give train.txt and test.txt for other names"
                )
            rows.append((prefix_of(folder, self.root) + name, name, match[1].rstrip("_- ")))
        return rows


# ---------------------------------------------------------------------------------------------------- writing
def write_dcase(
    root: Path,
    scenes: Sequence[str] = ("bus", "park", "tube", "tubestation"),
    clips_per_scene: int = 2,
    lists: bool = False,
    write: WriteMedia = placeholder,
) -> Path:
    """DCASE scenes: the two folders of the published archives, or one folder with `train.txt` and `test.txt`."""
    for split, folder in (("train", "scenes_stereo"), ("test", "scenes_stereo_testset")):
        lines = []
        for scene in scenes:
            for number in range(1, clips_per_scene + 1):
                if lists:
                    name = f"audio/{split}_{scene}_{number}.wav"
                    lines.append(f"{name}\t{scene}")
                else:
                    name = f"{folder}/{scene}{number:02d}.wav"
                put(root / name, write)
        if lists:
            write_lines(root / "evaluation_setup" / f"{split}.txt", lines)
    return root
