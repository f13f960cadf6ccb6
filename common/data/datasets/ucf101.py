"""UCF-101."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from common.data.datasets.base import (
    VIDEO_SUFFIXES,
    MediaDataset,
    Scan,
    entries,
    first_folder,
    prefix_of,
    read_lines,
    walk,
)

_VIDEO_FOLDERS = ("UCF-101", "UCF101", "videos", ".")
_LIST_FOLDERS = (
    "ucfTrainTestlist",
    "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist",
    "UCF-101/ucfTrainTestlist",
    "annotations",
)


# A file, and in training lists its label.
_LINE = re.compile(r"(.+?)(?:\s+(\d+))?")


class UCF101(MediaDataset):
    """UCF-101: 13,320 clips of 101 actions with three official divisions into training and test.

    Reads the published layout: ``UCF-101/<Class>/v_<Class>_gXX_cYY.avi`` and
    ``ucfTrainTestlist/{classInd,trainlist01,testlist01,...}.txt``. Labels are those of ``classInd.txt`` minus one.
    Files may be converted to another container.
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

    def checksums(self) -> Mapping[str, str]:
        # As TensorFlow Datasets recorded it.
        name = "UCF101TrainTestSplits-RecognitionTask.zip"
        return {name: "sha256:5c0d1a53b8ed364a2ac830a73f405e51bece7d98ce1254fd19ed4a36b224bd27"}

    def _scan(self, split: str, fold: int | None) -> Scan:
        videos = first_folder(self.root, _VIDEO_FOLDERS)
        lists = first_folder(self.root, _LIST_FOLDERS)
        if lists is None:
            raise self._lacks(self.root / _LIST_FOLDERS[0], "the lists of the divisions are missing")
        assert videos is not None
        assert fold is not None
        class_path = lists / "classInd.txt"
        list_path = lists / f"{split}list{fold:02d}.txt"
        for path in (class_path, list_path):
            if not path.is_file():
                raise self._lacks(path, f"the list {path.name} is missing")
        classes = self._classes(class_path)
        label_of = {name: label for label, name in enumerate(classes)}
        watched: list[Path] = [lists, class_path, list_path, videos]
        prefix = prefix_of(videos, self.root)
        scan = Scan(classes, f"{videos.name if prefix else 'class folders'} with {lists.name}", watched=watched)
        files: dict[str, str] = {}
        for class_name in entries(videos)[0]:
            if class_name in label_of:
                for name, stem in walk(videos / class_name, VIDEO_SUFFIXES, watched):
                    files.setdefault(f"{class_name}/{stem}", f"{prefix}{class_name}/{name}")
        for line in read_lines(list_path):
            match = _LINE.fullmatch(line)
            assert match is not None
            entry, given = match.groups()
            class_name = entry.split("/")[0]
            if class_name not in label_of:
                raise ValueError(f"{list_path}: class {class_name!r} of {entry!r} is not in {class_path.name}")
            label = label_of[class_name]
            if given is not None and int(given) != label + 1:
                raise ValueError(f"{list_path}: {entry!r} has label {given}, but {class_path.name} gives {label + 1}")
            found = files.get(os.path.splitext(entry)[0])
            if found is None:
                scan.missing_names.append(entry)
            else:
                scan.names.append(found)
                scan.labels.append(label)
        return scan

    def _classes(self, path: Path) -> tuple[str, ...]:
        numbered: dict[int, str] = {}
        for line in read_lines(path):
            number, _, class_name = line.partition(" ")
            if not number.isdigit() or not class_name.strip():
                raise ValueError(f"{path}: expected `<number> <class>`, found {line!r}")
            numbered[int(number)] = class_name.strip()
        if sorted(numbered) != list(range(1, len(numbered) + 1)):
            raise ValueError(f"{path}: the classes must be numbered 1 to {len(numbered)} without gaps")
        return tuple(numbered[number] for number in sorted(numbered))
