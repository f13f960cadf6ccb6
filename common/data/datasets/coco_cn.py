"""COCO-CN: Chinese captions of some photographs of COCO 2014."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from common.data.annotations import LanguageCaptions, read_once
from common.data.datasets.base import read_lines, write_lines
from common.data.datasets.captioned import one_language, read_text
from common.data.datasets.stair_captions import OnCOCO
from common.data.listing import DatasetError

_FOLDERS = ("coco-cn-version1805v1.1", ".")
_CAPTIONS = "imageid.human-written-caption.txt"


class COCOCN(OnCOCO):
    """COCO-CN: one or two human-written Chinese captions per photograph, with its own splits.

    Keys are COCO file names without suffix. For the arguments see :class:`OnCOCO`; `restval` has no effect.

    Source: docs/papers/m3p.md [8]; layout of `coco-cn-version1805v1.1`: one file with a line `<image>#<number>`, tab,
    caption per caption, and a list of images per split.
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

    def _captions(self, split: str, language: str) -> LanguageCaptions:
        captions = _read(
            tuple(
                self._one_of(*(f"{folder}/{name}" for folder in _FOLDERS))
                for name in (f"coco-cn_{split}.txt", _CAPTIONS)
            )
        )
        # Groups come from COCO's list. If it doesn't exist or lacks an image, each image is its own group.
        if not self.coco.has_list():
            return captions
        parts = [self.coco.images(part) for part in self.coco.splits]
        shown = {key: group for keys, _, groups in parts for key, group in zip(keys, groups)}
        group_numbers = [shown.get(key) for key in captions.keys]
        return captions if None in group_numbers else replace(captions, groups=np.array(group_numbers, dtype=np.int64))


@read_once()
def _read(paths: tuple[Path, ...]) -> LanguageCaptions:
    listed, written = paths
    wanted: dict[str, list[str]] = {key: [] for key in read_lines(listed)}
    for line in filter(str.strip, read_text(written).split("\n")):
        name, tab, text = line.partition("\t")
        key, mark, _ = name.strip().partition("#")
        if not (tab and mark and key):
            raise DatasetError(f"{written}: expected <image>#<number>, a tab and a caption, not {line[:80]!r}")
        if key in wanted:
            wanted[key].append(text)
    return one_language(written, "zh", wanted.items())


# ---------------------------------------------------------------------------------------------------- writing
def write_coco_cn(root: Path, parts: Mapping[str, Sequence[tuple[str, Sequence[str]]]]) -> None:
    """Write COCO-CN. Each part is a list of image names (without suffix) and captions."""
    home = root / "coco-cn-version1805v1.1"
    for part, images in parts.items():
        write_lines(home / f"coco-cn_{part}.txt", (stem for stem, _ in images))
    lines = (
        f"{stem}#{number}\t{text}"
        for images in parts.values()
        for stem, texts in images
        for number, text in enumerate(texts)
    )
    write_lines(home / "imageid.human-written-caption.txt", lines)
