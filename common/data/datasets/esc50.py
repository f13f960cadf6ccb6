"""ESC-50."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from common.data.datasets.base import (
    AUDIO_SUFFIXES,
    MediaDataset,
    Scan,
    csv_rows,
    first_folder,
    prefix_of,
    walk,
)

_FOLDERS = (".", "ESC-50-master", "ESC-50")


class ESC50(MediaDataset):
    """ESC-50: 2,000 five-second recordings of 50 kinds of sound in five official folds.

    Reads the published archive, also as ``ESC-50-master``: ``audio/<fold>-<source>-<take>-<target>.wav`` and
    ``meta/esc50.csv`` (columns filename, fold, target, category, esc10, src_file, take).

    Every clip carries its fold. With fold k, "test" is fold k and "train" the other four; without a fold every split,
    like "all", has everything, for protocols that run over the folds themselves.
    """

    name = "esc50"
    title = "ESC-50"
    splits = ("all", "train", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "test"}
    num_folds = 5
    num_classes = 50
    published_counts: ClassVar[Mapping[str, int]] = {"all": 2_000}
    streams = ("audio",)
    expected_layout = (
        "audio/<fold>-<source>-<take>-<target>.wav       (here or in ESC-50-master/)\n"
        "meta/esc50.csv: filename,fold,target,category,esc10,src_file,take"
    )
    size = "0.9 GB"
    license = "CC BY-NC 3.0 (the ESC-10 part CC BY 3.0)"
    source = "https://github.com/karolpiczak/ESC-50"

    def parts(self) -> list[tuple[str, int | None]]:
        return [("all", None)]

    def _scan(self, split: str, fold: int | None) -> Scan:
        home = next((self.root / name for name in _FOLDERS if (self.root / name / "meta/esc50.csv").is_file()), None)
        if home is None:
            raise self._lacks(self.root / "meta/esc50.csv")
        audio = first_folder(home, ("audio",))
        if audio is None:
            raise self._lacks(home / "audio")
        list_path = home / "meta/esc50.csv"
        watched: list[Path] = [list_path, home]
        files = {name: name for name, _ in walk(audio, AUDIO_SUFFIXES, watched)}
        rows = self._rows(list_path)
        categories: dict[int, str] = {}
        for name, _, target, category in rows:
            if categories.setdefault(target, category) != category:
                raise ValueError(
                    f"{list_path}: target {target} is {categories[target]!r} and, for {name}, {category!r}"
                )
        count = max(categories, default=-1) + 1
        classes = tuple(categories.get(target, f"unnamed {target}") for target in range(count))
        scan = Scan(classes, f"{prefix_of(home, self.root)}audio/ with meta/esc50.csv", watched=watched)
        scan.folds, scan.sound_labels = [], []
        prefix = prefix_of(audio, self.root)
        for name, own_fold, target, _ in rows:
            if fold is not None and ((split == "test" and own_fold != fold) or (split == "train" and own_fold == fold)):
                continue
            if name not in files:
                scan.missing_names.append(name)
                continue
            scan.names.append(prefix + name)
            scan.labels.append(target)
            scan.sound_labels.append(target)
            scan.folds.append(own_fold)
        return scan

    def _rows(self, path: Path) -> list[tuple[str, int, int, str]]:
        with csv_rows(path) as reader:
            lacking = [
                name for name in ("filename", "fold", "target", "category") if name not in (reader.fieldnames or ())
            ]
            if lacking:
                raise ValueError(
                    f"{path} lacks the columns {', '.join(lacking)}; "
                    "its first line must be filename,fold,target,category,esc10,src_file,take"
                )
            rows = []
            for line, row in enumerate(reader, start=2):
                try:
                    rows.append((row["filename"], int(row["fold"]), int(row["target"]), row["category"]))
                except (TypeError, ValueError):
                    raise ValueError(f"{path}, line {line}: fold and target must be whole numbers") from None
                if not 1 <= rows[-1][1] <= self.num_folds or rows[-1][2] < 0:
                    raise ValueError(f"{path}, line {line}: fold must be 1 to {self.num_folds} and target at least 0")
            return rows
