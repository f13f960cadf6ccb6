"""Conceptual Captions: web pictures with their alt texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common.data.annotations import LanguageCaptions, read_once
from common.data.datasets.base import write_lines
from common.data.datasets.captioned import CaptionedDataset, one_language, read_caption_table

_FILES = {
    "train": ("google.csv", "Train_GCC-training.tsv", "Train-GCC-training.tsv"),
    "val": ("google_valid.csv", "Validation_GCC-1.1.0-Validation.tsv", "Validation-GCC-1.1.0-Validation.tsv"),
}


class ConceptualCaptions(CaptionedDataset):
    """Conceptual Captions: web pictures with one English caption each. Every picture has its own web address.

    Keys are row numbers from 0; a heading doesn't count. Keys must match the digits of `image_id` in region features.

    Source: docs/papers/m3p.md [4] and [8] (`google.csv`, `train_<k>.h5`, `google_valid_fp16.h5`). The lists that Google
    distributes have no heading.
    """

    name = "conceptual_captions"
    title = "Conceptual Captions"
    splits = ("train", "val")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val", "valid": "val"}
    languages = ("en",)
    published_counts: ClassVar[Mapping[str, int]] = {"train": 3_318_333, "val": 15_840}
    region_keys = "number"
    official_regions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train_*.h5",),
        "val": ("google_valid*.h5",),
    }
    image_folders: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("training", "train", "images/train"),
        "val": ("validation", "val", "images/val"),
    }
    expected_layout = (
        "Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv   (caption, tab, address)\n"
        "  or google.csv                                                  (tabs, a column `caption`)\n"
        "training/<row>.jpg and validation/<row>.jpg                      (optional with region features)"
    )
    size = "0.5 GB of text; 430 GB of pictures; 2.7 TB of region features"
    license = "free for any use, with acknowledgment of Google; the pictures belong to their owners"
    source = "https://ai.google.com/research/ConceptualCaptions/download; pictures with img2dataset"

    def _captions(self, split: str, language: str) -> LanguageCaptions:
        return _read(self._one_of(*_FILES[split], reason="the captions are missing"))


@read_once()
def _read(path: Path) -> LanguageCaptions:
    return one_language(path, "en", ((str(number), [text]) for number, text in read_caption_table(path)))


# ---------------------------------------------------------------------------------------------------- writing
def write_conceptual_captions(root: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Write the lists of Conceptual Captions; row n belongs to `training/<n>.jpg` or `validation/<n>.jpg`."""
    for part, captions in parts.items():
        folder = ConceptualCaptions.image_folders[part][0]
        lines = (f"{text}\thttp://example.org/{folder}/{row}.jpg" for row, text in enumerate(captions))
        write_lines(root / _FILES[part][1], lines)
