"""STAIR Captions: Japanese captions of the photographs of COCO 2014."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from common.data.annotations import LanguageCaptions, read_once, single_spaced
from common.data.datasets.base import write_json
from common.data.datasets.captioned import CaptionedDataset
from common.data.datasets.coco import Annotated, coco_captions, coco_image, read_captions
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.listing import DatasetError
from common.data.sequences import Rows, Texts

_FOLDERS = ("", "stair_captions_v1.2/")
_FILES = ("stair_captions_v1.2_train.json", "stair_captions_v1.2_val.json")


class OnCOCO(CaptionedDataset):
    """Base of captions in another language for the photographs of COCO 2014.

    Args:
        coco: folder of COCO 2014 with Karpathy's list; None = the sibling folder `coco`.
        restval: whether `train` includes `restval`; only for data sets that use Karpathy's split.
        regions: folder of the region features; None = `regions` in the folder of COCO.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        coco: str | os.PathLike[str] | None = None,
        restval: bool = False,
        regions: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(root, regions)
        self.coco_root = None if coco is None else Path(coco).expanduser()
        self.restval = restval

    @property
    def coco(self) -> COCOKarpathy:
        return COCOKarpathy(self.coco_root or self.root.parent / "coco", self.restval)

    @property
    def regions_folder(self) -> Path:
        return self.regions_root or self.coco.regions_folder

    def region_paths(self, split: str) -> tuple[Path, ...]:
        """Return the region files, by default COCO's; files of all splits if this set's splits differ from COCO's."""
        if self.regions_root is not None:
            return super().region_paths(split)
        return self.coco.all_region_paths() if self.own_splits else self.coco.region_paths(split)

    def image_path(self, key: str, split: str) -> Path:
        return self.coco.image_path(key, split)

    def _options(self) -> dict[str, object]:
        return {"coco": None if self.coco_root is None else str(self.coco_root), "restval": self.restval}

    def _picture_notes(self, split: str) -> list[str]:
        return []  # COCO's status reports its images


class STAIRCaptions(OnCOCO):
    """STAIR Captions: five Japanese captions per photograph of COCO, in Karpathy's split.

    Keys are COCO file names without suffix. For the arguments see :class:`OnCOCO`.

    Source: docs/papers/m3p.md [8]. The files have the format of COCO's captions.
    """

    name = "stair_captions"
    title = "STAIR Captions"
    splits = ("train", "val", "test")
    split_aliases: ClassVar[Mapping[str, str]] = {"validation": "val"}
    languages = ("ja",)
    expected_layout = (
        "stair_captions_v1.2_train.json and stair_captions_v1.2_val.json\n"
        "../coco/dataset_coco.json and COCO's images   (or where `coco` says)"
    )
    size = "0.2 GB of text, without COCO"
    license = "CC BY 4.0"
    source = "https://stair-lab-cit.github.io/STAIR-captions-web/ (v1.2)"

    def published_count(self, split: str, fold: int | None = None) -> int | None:
        return self.coco.published_count(split)

    def _captions(self, split: str, language: str) -> LanguageCaptions:
        coco = self.coco
        if not coco.has_list():
            raise self._lacks(coco.root / "dataset_coco.json", "the list of Karpathy's split is missing")
        paths = [self._one_of(*(folder + name for folder in _FOLDERS)) for name in _FILES]
        by_number = _read(tuple(paths))
        kept = [row for row in zip(*coco.images(split)) if by_number.get(row[1])]
        if not kept:
            raise DatasetError(f"{paths[0]}: no caption matches an image of {coco.root}, split {split!r}")
        return LanguageCaptions(
            language,
            Texts(key for key, _, _ in kept),
            Rows.texts(by_number[number] for _, number, _ in kept),
            np.array([group for _, _, group in kept], dtype=np.int64),
        )


@read_once(2)
def _read(paths: tuple[Path, ...]) -> dict[int, tuple[str, ...]]:
    """Return the captions of each image number."""
    return {
        number: tuple(map(single_spaced, texts))
        for images in map(read_captions, paths)
        for number, texts in zip(images.image_ids.tolist(), images.captions)
    }


# ---------------------------------------------------------------------------------------------------- writing
def write_stair_captions(root: Path, parts: Mapping[str, Sequence[Annotated]], description: str) -> None:
    """Write `stair_captions_v1.2_{train,val}.json` from the parts `train2014` and `val2014`."""
    for part, images in parts.items():
        document = {
            "info": {"description": description, "version": "1.2", "year": 2018},
            "licenses": [],
            "images": [coco_image(image) for image in images],
            "annotations": coco_captions(images),
        }
        write_json(root / f"stair_captions_v1.2_{part.removesuffix('2014')}.json", document)
