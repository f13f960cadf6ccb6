"""HMDB-51."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common.data.datasets.base import (
    VIDEO_SUFFIXES,
    MediaDataset,
    Scan,
    WriteMedia,
    entries,
    placeholder,
    prefix_of,
    put,
    read_lines,
    walk,
    write_lines,
)
from common.data.listing import DatasetError

_VIDEO_FOLDERS = ("hmdb51_org", "hmdb51", "videos", ".")
_LIST_FOLDERS = ("testTrainMulti_7030_splits", "test_train_splits/testTrainMulti_7030_splits", "splits", "annotations")
_FLAG_OF = {"train": "1", "test": "2"}


class HMDB51(MediaDataset):
    """HMDB-51: 6,766 clips of 51 actions with three official divisions.

    Each line of a list has a file and a flag: 1 training, 2 test, 0 unused. A division has 70 training and 30 test
    clips per class. Classes are in alphabetical order.
    """

    name = "hmdb51"
    title = "HMDB-51"
    splits = ("train", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "test"}
    num_folds = 3
    fold_needed = True
    num_classes = 51
    published_counts: ClassVar[Mapping[str, int]] = {"train": 3_570, "test": 1_530}
    expected_layout = (
        "<class>/<video>.avi, or hmdb51_org/<class>/<video>.avi   (hmdb51_org.rar and the 51 archives inside it)\n"
        "testTrainMulti_7030_splits/<class>_test_split1.txt       (test_train_splits.rar)\n"
        "testTrainMulti_7030_splits/<class>_test_split2.txt, ..._test_split3.txt"
    )
    size = "2 GB"
    license = "CC BY 4.0 for the collection; the clips belong to the makers of the films"
    source = "https://serre.lab.brown.edu/hmdb51.html"

    def _scan(self, split: str, fold: int | None) -> Scan:
        videos = self._one_of(*_VIDEO_FOLDERS)
        lists = self._one_of(*_LIST_FOLDERS, reason="the lists of the divisions are missing")
        ending = f"_test_split{fold}.txt"
        classes = tuple(sorted(name.removesuffix(ending) for name in entries(lists)[1] if name.endswith(ending)))
        if not classes:
            raise self._lacks(lists / f"<class>{ending}", f"the lists of division {fold} are missing")
        prefix = prefix_of(videos, self.root)
        where = videos.name if prefix else "hmdb51 class folders"
        scan = Scan(classes, f"{where} with {lists.name}", [lists, videos])
        for label, class_name in enumerate(classes):
            path = lists / f"{class_name}{ending}"
            scan.watched.append(path)
            files: dict[str, str] = {}
            if (videos / class_name).is_dir():
                for name, stem in walk(videos / class_name, VIDEO_SUFFIXES, scan.watched):
                    files.setdefault(stem, f"{prefix}{class_name}/{name}")
            for line in read_lines(path):
                # The flag is the last word, because file names may contain spaces.
                name, _, flag = line.rpartition(" ")
                name = name.strip()
                if flag not in ("0", "1", "2") or not name:
                    raise DatasetError(f"{path}: expected `<file> <0, 1 or 2>`, found {line!r}")
                if flag == _FLAG_OF[split]:
                    scan.add(files.get(os.path.splitext(name)[0]), f"{class_name}/{name}", label=label)
        return scan


# ---------------------------------------------------------------------------------------------------- writing
def write_hmdb51(
    root: Path,
    classes: Sequence[str] = ("brush_hair", "wave"),
    clips_per_class: int = 4,
    train: int = 2,
    test: int = 1,
    # Real names contain hash signs and brackets.
    clip_name: str = "#{number}_Rhythm_(clap)!_{name}_u_nm_np1_fr_goo_{number}.avi",
    nested: bool = False,
    write: WriteMedia = placeholder,
) -> Path:
    """Write HMDB-51. Division k tests on a class's k-th block of `test` clips and trains on the clips after it."""
    clips = {name: [clip_name.format(name=name, number=n) for n in range(clips_per_class)] for name in classes}
    for number in range(clips_per_class):
        for name in classes:
            put((root / "hmdb51_org" if nested else root) / name / clips[name][number], write)
    for name, files in clips.items():
        for fold in range(3):
            flags = ["0"] * clips_per_class
            for offset in range(test + train):
                flags[(fold * test + offset) % clips_per_class] = "2" if offset < test else "1"
            lines = [f"{clip} {flag} " for clip, flag in zip(files, flags)]
            write_lines(root / "testTrainMulti_7030_splits" / f"{name}_test_split{fold + 1}.txt", lines)
    return root
