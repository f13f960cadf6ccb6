"""SBU: a million photographs of Flickr with their owners' descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from common.data.annotations import LanguageCaptions, read_json, read_once
from common.data.datasets.captioned import CaptionedDataset, one_language, read_text_lines
from common.data.datasets.conceptual_captions import read_numbered_captions
from common.data.listing import DatasetError
from common.files import parsing

_FILES = ("sbu.csv", "sbu-captions-all.json", "SBU_captioned_photo_dataset_captions.txt")


class SBU(CaptionedDataset):
    """SBU captioned photo data set: one English caption per photograph, one split. Keys are row numbers, from 0.

    Source: docs/papers/m3p.md [8] (`sbu.csv`); the authors distribute a JSON file of lists, and before that two text
    files, one of captions and one of addresses, row by row.
    """

    name = "sbu"
    title = "SBU captioned photos"
    splits = ("train",)
    languages = ("en",)
    published_counts: ClassVar[Mapping[str, int]] = {"train": 1_000_000}
    region_keys = "number"
    official_regions: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("sbu_*.h5", "train_*.h5")}
    image_folders: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("images", "dataset", "sbu_images")}
    expected_layout = (
        "sbu-captions-all.json                                 (lists `captions` and `image_urls`)\n"
        "  or SBU_captioned_photo_dataset_captions.txt         (one caption a line)\n"
        "  or sbu.csv                                          (tabs, a column `caption`)\n"
        "images/<row>.jpg                                      (optional with region features)"
    )
    size = "0.1 GB of text; 130 GB of pictures; 0.4 TB of region features with 16 bits"
    license = "for research; the pictures belong to their Flickr authors"
    source = "https://www.cs.rice.edu/~vo9/sbucaptions/"

    def _captions(self, split: str, language: str) -> LanguageCaptions:
        path = self._one_of(*_FILES, reason="the captions are missing")
        return read_numbered_captions(path) if path.suffix == ".csv" else _read(path)


@read_once(2)
def _read(path: Path) -> LanguageCaptions:
    if path.suffix == ".json":
        with parsing(path, DatasetError):
            content = read_json(path)
            texts, addresses = content["captions"], content["image_urls"]
    else:
        texts = read_text_lines(path)
        beside = path.with_name(path.name.replace("captions", "urls"))
        addresses = read_text_lines(beside) if beside.is_file() else texts
    if len(addresses) != len(texts):
        # Only the row links caption and picture, so a lost row shifts all later ones.
        raise DatasetError(f"{path}: {len(texts):,} captions, but {len(addresses):,} addresses; get both anew")
    return one_language(path, "en", ((str(number), [text]) for number, text in enumerate(texts)))
