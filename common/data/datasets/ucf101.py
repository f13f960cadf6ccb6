"""UCF-101."""

from __future__ import annotations

import os
import re
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
from common.files import parsing

_VIDEO_FOLDERS = ("UCF-101", "UCF101", "videos", ".")
_LIST_FOLDERS = (
    "ucfTrainTestlist",
    "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist",
    "UCF-101/ucfTrainTestlist",
    "annotations",
)


class UCF101(MediaDataset):
    """UCF-101: 13,320 clips of 101 actions with three official divisions into training and test.

    Labels are the numbers in `classInd.txt` minus one. Videos may be converted to another format than AVI.
    """

    name = "ucf101"
    title = "UCF-101"
    splits = ("train", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "test"}
    num_folds = 3
    fold_needed = True
    num_classes = 101
    published_counts: ClassVar[Mapping[str, int]] = {
        "train 1": 9_537,
        "test 1": 3_783,
        "train 2": 9_586,
        "test 2": 3_734,
        "train 3": 9_624,
        "test 3": 3_696,
    }
    expected_layout = (
        "UCF-101/<Class>/v_<Class>_g<group>_c<clip>.avi            (UCF101.rar)\n"
        "ucfTrainTestlist/classInd.txt                             (UCF101TrainTestSplits-RecognitionTask.zip)\n"
        "ucfTrainTestlist/trainlist01.txt ... trainlist03.txt\n"
        "ucfTrainTestlist/testlist01.txt ... testlist03.txt"
    )
    size = "6.5 GB"
    license = "no explicit license, for research; the videos belong to their uploaders"
    source = "https://www.crcv.ucf.edu/data/UCF101.php"

    def _scan(self, split: str, fold: int | None) -> Scan:
        videos = self._one_of(*_VIDEO_FOLDERS)
        lists = self._one_of(*_LIST_FOLDERS, reason="the lists of the divisions are missing")
        class_path, list_path = lists / "classInd.txt", lists / f"{split}list{fold:02d}.txt"
        for path in (class_path, list_path):
            if not path.is_file():
                raise self._lacks(path, f"the list {path.name} is missing")
        with parsing(class_path, DatasetError):
            lines = (line.partition(" ") for line in read_lines(class_path))
            numbered = {int(number): name.strip() for number, _, name in lines}
            classes = tuple(numbered[number] for number in range(1, len(numbered) + 1))
        prefix = prefix_of(videos, self.root)
        where = videos.name if prefix else "class folders"
        scan = Scan(classes, f"{where} with {lists.name}", [lists, class_path, list_path, videos])
        files: dict[str, str] = {}
        for class_name in entries(videos)[0]:
            if class_name in classes:
                for name, stem in walk(videos / class_name, VIDEO_SUFFIXES, scan.watched):
                    files.setdefault(f"{class_name}/{stem}", f"{prefix}{class_name}/{name}")
        for line in read_lines(list_path):
            entry = re.sub(r"\s+\d+$", "", line)  # training lists also give the label
            class_name = entry.split("/")[0]
            if class_name not in classes:
                raise DatasetError(f"{list_path}: class {class_name!r} of {entry!r} is not in {class_path.name}")
            scan.add(files.get(os.path.splitext(entry)[0]), entry, label=classes.index(class_name))
        return scan


# ---------------------------------------------------------------------------------------------------- writing
def write_ucf101(
    root: Path,
    classes: Sequence[str] = ("ApplyEyeMakeup", "YoYo"),
    groups: int = 3,
    clips_per_group: int = 2,
    tested: int = 1,
    newline: str = "\r\n",
    write: WriteMedia = placeholder,
) -> Path:
    """Write UCF-101. Division k tests on the k-th block of `tested` groups, and trains on the other groups."""
    lists: dict[str, list[str]] = {}
    for group in range(groups):
        for clip in range(clips_per_group):
            for label, name in enumerate(classes, 1):
                entry = f"{name}/v_{name}_g{group + 1:02d}_c{clip + 1:02d}.avi"
                put(root / "UCF-101" / entry, write)
                for fold in range(3):
                    kind, line = ("test", entry) if group // tested == fold else ("train", f"{entry} {label}")
                    lists.setdefault(f"{kind}list{fold + 1:02d}.txt", []).append(line)
    folder = root / "ucfTrainTestlist"
    write_lines(folder / "classInd.txt", [f"{label} {name}" for label, name in enumerate(classes, 1)], newline)
    for list_name, lines in lists.items():
        write_lines(folder / list_name, sorted(lines))
    return root
