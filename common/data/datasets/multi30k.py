"""Multi30K: the photographs of Flickr30k with captions in English, German, French and Czech."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from common.data.annotations import LanguageCaptions, read_once
from common.data.datasets.base import first_file
from common.data.datasets.captioned import CaptionedDataset, read_text_lines
from common.data.sequences import Rows, Texts

_HOMES = ("data/", "")
_TASK1 = {"train": "train", "val": "val", "test": "test_2016_flickr"}
_TASK2 = {"train": "train", "val": "val", "test": "test_2016"}
_CAPTIONS = 5


class Multi30K(CaptionedDataset):
    """Multi30K: five independent captions in English and German (task 2), one French and Czech translation (task 1).

    The test split is that of 2016. Keys are Flickr30k file names without suffix.

    Source: docs/papers/m3p.md [8]; layout of the repository multi30k/dataset: line i of `data/task2/raw/train.3.de.gz`
    and of `data/task1/raw/train.fr.gz` belongs to line i of the image list, which both tasks share.
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
    size = "20 MB of text; 4.4 GB of pictures; 13 GB of region features with 16 bits"
    license = "captions CC BY-NC-SA 4.0; the pictures belong to their Flickr authors, on request from Flickr30k"
    source = (
        "https://github.com/multi30k/dataset; pictures from https://shannon.cs.illinois.edu/DenotationGraph or, for "
        "task 1, https://www.statmt.org/wmt18/multimodal-task.html"
    )

    def captions(self, split: str, language: str) -> LanguageCaptions:
        split, _ = self._checked(split, None)
        self._checked_language(language)
        listed = self._image_list(split)
        if language in ("en", "de"):
            name = _TASK2[split]
            files = [self._text(f"task2/raw/{name}.{number}.{language}") for number in range(1, _CAPTIONS + 1)]
        else:
            files = [self._text(f"task1/raw/{_TASK1[split]}.{language}")]
        paths = (listed, *files)
        return self.grouped(_read(language, paths), split)

    def _image_list(self, split: str) -> Path:
        names = (f"task1/image_splits/{_TASK1[split]}.txt", f"task2/image_splits/{_TASK2[split]}_images.txt")
        path = first_file(self.root, [home + name for name in names for home in _HOMES])
        if path is None:
            raise self._lacks(self.root / _HOMES[0] / names[0], f"the list of images of split {split!r} is missing")
        return path

    def _text(self, name: str) -> Path:
        path = first_file(self.root, [f"{home}{name}{packed}" for home in _HOMES for packed in (".gz", "")])
        if path is None:
            raise self._lacks(self.root / _HOMES[0] / f"{name}.gz", "a file of captions is missing")
        return path


@read_once(16)
def _read(language: str, paths: tuple[Path, ...]) -> LanguageCaptions:
    listed, *files = paths
    # Lists of other years append a caption number to the name.
    keys = [os.path.splitext(line.split("#")[0])[0] for line in read_text_lines(listed)]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{listed}: an image occurs twice")
    columns = []
    for path in files:
        lines = read_text_lines(path)
        if len(lines) != len(keys):
            raise ValueError(f"{path}: {len(lines)} captions for the {len(keys)} images of {listed}; get both anew")
        columns.append(lines)
    rows = [tuple(" ".join(text.split()) for text in texts if text) for texts in zip(*columns)]
    kept = [(key, texts) for key, texts in zip(keys, rows) if texts]
    if not kept:
        raise ValueError(f"{files[0]}: holds no captions; get the file anew")
    return LanguageCaptions(language, Texts(key for key, _ in kept), Rows.texts(texts for _, texts in kept))
