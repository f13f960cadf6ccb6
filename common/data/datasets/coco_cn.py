"""COCO-CN: Chinese captions of some photographs of COCO 2014."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from common.data.annotations import LanguageCaptions, read_once
from common.data.datasets.base import first_folder, read_lines
from common.data.datasets.captioned import read_text
from common.data.datasets.stair_captions import OnCOCO
from common.data.sequences import Rows, Texts

_FOLDERS = ("coco-cn-version1805v1.1", ".")
_CAPTIONS = "imageid.human-written-caption.txt"


class COCOCN(OnCOCO):
    """COCO-CN: one or two human-written Chinese captions per photograph, with its own splits.

    Keys are COCO file names without suffix. For the arguments see :class:`OnCOCO`; `restval` has no effect.

    Source: docs/papers/m3p.md [8]; layout of `coco-cn-version1805v1.1`: lines of `<image>#<number>`, tab, caption, and
    a list of images per split.
    """

    name = "coco_cn"
    title = "COCO-CN"
    splits = ("train", "val", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val"}
    languages = ("zh",)
    own_splits = True
    published_counts: ClassVar[Mapping[str, int]] = {"train": 18_341, "val": 1_000, "test": 1_000}
    expected_layout = (
        "coco-cn-version1805v1.1/imageid.human-written-caption.txt\n"
        "coco-cn-version1805v1.1/coco-cn_{train,val,test}.txt\n"
        "../coco/ with COCO's images                            (or where `coco` says; optional with region features)"
    )
    size = "3 MB of text, without COCO"
    license = "for research, on request"
    source = "https://github.com/li-xirong/coco-cn"

    def captions(self, split: str, language: str = "zh") -> LanguageCaptions:
        split, _ = self._checked(split, None)
        self._checked_language(language)
        home = first_folder(self.root, _FOLDERS)
        paths = [(home or self.root) / name for name in (f"coco-cn_{split}.txt", _CAPTIONS)]
        for path in paths:
            if not path.is_file():
                raise self._lacks(path)
        captions = _read(tuple(paths))
        return replace(captions, groups=self._groups(captions, split))

    def _groups(self, captions: LanguageCaptions, split: str) -> npt.NDArray[np.int64]:
        """Groups from COCO's list; without it, or if it lacks an image, all groups differ."""
        if not self.coco.has_list():
            return captions.groups
        parts = [self.coco.images(part) for part in self.coco.splits]
        shown = {key: group for keys, _, groups in parts for key, group in zip(keys, groups)}
        found = [shown.get(key) for key in captions.keys]
        return captions.groups if None in found else np.array(found, dtype=np.int64)


@read_once()
def _read(paths: tuple[Path, ...]) -> LanguageCaptions:
    listed, written = paths
    keys = read_lines(listed)
    if len(set(keys)) < len(keys):
        raise ValueError(f"{listed}: an image occurs twice")
    wanted: dict[str, list[str]] = {key: [] for key in keys}
    for number, line in enumerate(read_text(written).split("\n"), start=1):
        if not line.strip():
            continue
        name, tab, text = line.partition("\t")
        key, mark, _ = name.strip().partition("#")
        if not (tab and mark and key):
            raise ValueError(f"{written}, line {number}: <image>#<number>, a tab and a caption are expected")
        if key in wanted and text.strip():
            wanted[key].append(" ".join(text.split()))
    kept = [(key, texts) for key, texts in wanted.items() if texts]
    if not kept:
        raise ValueError(f"{written}: has no caption of an image of {listed}")
    return LanguageCaptions("zh", Texts(key for key, _ in kept), Rows.texts(texts for _, texts in kept))
