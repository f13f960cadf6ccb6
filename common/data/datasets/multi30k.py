"""Multi30K: the photographs of Flickr30k with captions in English, German, French and Czech."""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common.data.annotations import LanguageCaptions, read_once
from common.data.datasets.base import write_lines
from common.data.datasets.captioned import CaptionedDataset, one_language, read_text_lines
from common.data.listing import DatasetError

_HOMES = ("data/", "", "dataset-master/data/")
_TASK1 = {"train": "train", "val": "val", "test": "test_2016_flickr"}
_TASK2 = {"train": "train", "val": "val", "test": "test_2016"}
_CAPTIONS = 5


class Multi30K(CaptionedDataset):
    """Multi30K: five captions each in English and German (task 2), one translation each in French and Czech (task 1).

    The test split is from 2016. Keys are Flickr30k file names without suffix.

    Source: docs/papers/m3p.md [8]; layout of the repository multi30k/dataset: line i of `data/task2/raw/train.3.de.gz`
    and of `data/task1/raw/train.fr.gz` belongs to line i of the image list. Both tasks share the image list.
    """

    name = "multi30k"
    title = "Multi30K"
    splits = ("train", "val", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {
        "validation": "val",
        "test_2016": "test",
        "test_2016_flickr": "test",
    }
    languages = ("en", "de", "fr", "cs")
    published_counts: ClassVar[Mapping[str, int]] = {"train": 29_000, "val": 1_014, "test": 1_000}
    image_folders: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        splits, ("flickr30k-images", "flickr30k_images", "images")
    )
    expected_layout = (
        "data/task2/raw/{train,val,test_2016}.{1..5}.{en,de}.gz           (packed or not)\n"
        "data/task1/raw/{train,val,test_2016_flickr}.{fr,cs}.gz\n"
        "data/task1/image_splits/{train,val,test_2016_flickr}.txt\n"
        "flickr30k-images/<number>.jpg                                    (optional with region features)"
    )
    size = "20 MB of text; 4.4 GB of pictures; 25 GB of region features"
    license = "captions CC BY-NC-SA 4.0; the pictures belong to their Flickr authors, on request from Flickr30k"
    source = (
        "https://github.com/multi30k/dataset; pictures from https://shannon.cs.illinois.edu/DenotationGraph or, for "
        "task 1, https://www.statmt.org/wmt18/multimodal-task.html"
    )

    def _captions(self, split: str, language: str) -> LanguageCaptions:
        if language in ("en", "de"):
            texts = [f"task2/raw/{_TASK2[split]}.{number}.{language}" for number in range(1, _CAPTIONS + 1)]
        else:
            texts = [f"task1/raw/{_TASK1[split]}.{language}"]
        listed = self._one_of(*(f"{home}task1/image_splits/{_TASK1[split]}.txt" for home in _HOMES))
        packed = [(f"{name}.gz", name) for name in texts]
        files = [self._one_of(*(home + name for home in _HOMES for name in names)) for names in packed]
        return _read(language, (listed, *files))


@read_once(16)
def _read(language: str, paths: tuple[Path, ...]) -> LanguageCaptions:
    listed, *files = paths
    keys = [os.path.splitext(line)[0] for line in read_text_lines(listed)]
    columns = [read_text_lines(path) for path in files]
    for path, lines in zip(files, columns):
        if len(lines) != len(keys):
            raise DatasetError(
                f"{path}: {len(lines)} captions for the {len(keys)} images of {listed}; download both again"
            )
    return one_language(listed, language, zip(keys, zip(*columns)))


# ---------------------------------------------------------------------------------------------------- writing
def write_multi30k(
    root: Path, split: str, stems: Sequence[str], captions: Mapping[str, Sequence[Sequence[str]]]
) -> None:
    """Write one split of Multi30K: five captions per image in `en` and `de`, one in the other languages."""
    home = root / "data"
    for folder in ("task1/raw", "task2/raw"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    write_lines(home / f"task1/image_splits/{_TASK1[split]}.txt", (f"{stem}.jpg" for stem in stems))
    for language, rows in captions.items():
        for number, texts in enumerate(zip(*rows), 1):
            name = f"task1/raw/{_TASK1[split]}.{language}.gz"
            if language in ("en", "de"):
                name = f"task2/raw/{_TASK2[split]}.{number}.{language}.gz"
            # Without a time stamp, the same text always gives the same file.
            packed = gzip.compress("".join(f"{text}\n" for text in texts).encode(), mtime=0)
            (home / name).write_bytes(packed)
