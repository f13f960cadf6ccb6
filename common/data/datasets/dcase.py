"""DCASE acoustic scenes: the set that audio-visual papers call DCASE (2014)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from common.data.datasets.base import (
    AUDIO_SUFFIXES,
    MediaDataset,
    Scan,
    first_file,
    first_folder,
    prefix_of,
    read_lines,
    walk,
)

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
        lists = {
            part: first_file(self.root, [f"{folder}{part}.txt" for folder in _LIST_FOLDERS]) for part in self.splits
        }
        if lists[split] is not None:
            return self._from_lists(split, lists)
        return self._from_names(split)

    def _from_lists(self, split: str, lists: dict[str, Path | None]) -> Scan:
        own_list = lists[split]
        assert own_list is not None
        watched: list[Path] = []
        rows: dict[str, list[tuple[str, str]]] = {}
        for part, path in lists.items():
            if path is not None:
                watched += [path, path.parent]
                rows[part] = self._rows(path)
        classes = tuple(sorted({scene for part in rows.values() for _, scene in part}))
        scan = Scan(classes, f"lists {own_list.relative_to(self.root)}", watched=watched)
        scan.sound_labels = []
        label_of = {name: label for label, name in enumerate(classes)}
        for name, scene in rows[split]:
            found = next((base + name for base in _BASES if (self.root / (base + name)).is_file()), None)
            # Moving or removing a recording changes its folder.
            watched.append((self.root / (found or name)).parent)
            if found is None:
                scan.missing_names.append(name)
                continue
            scan.names.append(Path(os.path.normpath(found)).as_posix())
            scan.labels.append(label_of[scene])
            scan.sound_labels.append(label_of[scene])
        return scan

    def _rows(self, path: Path) -> list[tuple[str, str]]:
        rows = []
        for line in read_lines(path):
            fields = [part.strip() for part in (line.split("\t") if "\t" in line else line.rsplit(maxsplit=1))]
            if len(fields) < 2 or not fields[1]:
                raise ValueError(f"{path}: expected `<path><TAB><scene>`, found {line!r}")
            rows.append((fields[0].replace("\\", "/"), fields[1]))
        return rows

    def _from_names(self, split: str) -> Scan:
        folders = {part: first_folder(self.root, names) for part, names in _FOLDERS.items()}
        if folders[split] is None:
            raise self._lacks(self.root / _FOLDERS[split][-1])
        watched: list[Path] = []
        recordings: dict[str, list[tuple[str, str]]] = {}
        for part, folder in folders.items():
            if folder is not None:
                recordings[part] = [
                    (prefix_of(folder, self.root) + name, self._scene(folder / name, stem))
                    for name, stem in walk(folder, AUDIO_SUFFIXES, watched)
                ]
        classes = tuple(sorted({scene for part in recordings.values() for _, scene in part}))
        label_of = {name: label for label, name in enumerate(classes)}
        scan = Scan(classes, "scenes_stereo/ and scenes_stereo_testset/, scene from the name", watched=watched)
        scan.names = [name for name, _ in recordings[split]]
        scan.labels = [label_of[scene] for _, scene in recordings[split]]
        scan.sound_labels = list(scan.labels)
        return scan

    def _scene(self, path: Path, stem: str) -> str:
        match = _NAME.fullmatch(stem)
        if match is None:
            raise ValueError(f"{path}: expected a name such as bus01.wav; give train.txt and test.txt for other names")
        return match.group(1).rstrip("_- ")
