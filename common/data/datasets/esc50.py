"""ESC-50."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common.data.annotations import read_csv
from common.data.datasets.base import (
    AUDIO_SUFFIXES,
    MediaDataset,
    Scan,
    WriteMedia,
    placeholder,
    prefix_of,
    put,
    walk,
    write_lines,
)

_FOLDERS = (".", "ESC-50-master", "ESC-50")


class ESC50(MediaDataset):
    """ESC-50: 2,000 five-second recordings of 50 kinds of sound in five official folds.

    Every clip has a fold number. With fold k, "test" is fold k and "train" is the other four folds. Without a fold,
    every split has all clips, for protocols that loop over the folds.
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

    def _scan(self, split: str, fold: int | None) -> Scan:
        list_path = self._one_of(*(f"{folder}/meta/esc50.csv" for folder in _FOLDERS))
        audio = list_path.parent.parent / "audio"
        if not audio.is_dir():
            raise self._lacks(audio)
        watched: list[Path] = [list_path, audio.parent]
        files = {name for name, _ in walk(audio, AUDIO_SUFFIXES, watched)}
        rows = list(read_csv(list_path, _row))
        categories = {target: category for _, _, target, category in rows}
        classes = tuple(
            categories.get(target, f"unnamed {target}") for target in range(max(categories, default=-1) + 1)
        )
        prefix = prefix_of(audio, self.root)
        scan = Scan(classes, f"{prefix} with meta/esc50.csv", watched)
        for name, own_fold, target, _ in rows:
            if fold is None or split == "all" or (own_fold == fold) == (split == "test"):
                file_name = prefix + name if name in files else None
                scan.add(file_name, name, label=target, sound_label=target, fold=own_fold)
        return scan


def _row(row: dict[str, str]) -> tuple[str, int, int, str]:
    fold, target = int(row["fold"]), int(row["target"])
    if not 1 <= fold <= ESC50.num_folds or target < 0:
        raise ValueError(f"fold must be 1 to {ESC50.num_folds} and target at least 0, not {fold} and {target}")
    return row["filename"], fold, target, row["category"]


# ---------------------------------------------------------------------------------------------------- writing
def write_esc50(
    root: Path,
    categories: Sequence[str] = ("dog", "rooster", "rain"),
    clips_per_fold: int = 1,
    newline: str = "\r\n",
    write: WriteMedia = placeholder,
) -> Path:
    """Write the same number of clips of each category into each of the five folds."""
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold, _, target in itertools.product(range(1, 6), range(clips_per_fold), range(len(categories))):
        source = 100_000 + len(lines) - 1
        name = f"{fold}-{source}-A-{target}.wav"
        put(root / "audio" / name, write)
        lines.append(f"{name},{fold},{target},{categories[target].replace(' ', '_')},False,{source},A")
    write_lines(root / "meta" / "esc50.csv", lines, newline)
    return root
