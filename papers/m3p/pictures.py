"""Pictures as regions: find the pictures with regions, read them, and batch them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.datasets.captioned import LanguageCaptioned
from common.data.item_dataset import ItemDataset, Sample, TooManyBrokenFiles
from common.data.listing import ClipTable, Listing
from common.data.media import MediaError
from common.data.regions import RegionError, RegionFeatures
from common.data.sequences import Texts
from papers.m3p.captions import CaptionReader


@dataclass
class CaptionSet:
    """Captioned images in one language; a pre-training epoch shows `captions_per_image` captions of each."""

    dataset: LanguageCaptioned
    language: str = "en"
    captions_per_image: int = 1


@dataclass(frozen=True, eq=False)
class RegionArrays:
    """The regions of one picture.

    Args:
        features: not normalized, float32 [R, F].
        boxes: five numbers each, scaled to length 1, float32 [R, 5].
        classes: int64 [R], 0 is background.
        distribution: over the classes, float32 [R, C]; None unless requested.
    """

    features: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    distribution: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Pictures:
    """N pictures and their regions: `source` [N] is the position in `features`; `missing` pictures are left out."""

    name: str
    version: str
    keys: Sequence[str]
    features: Sequence[RegionFeatures]
    source: npt.NDArray[np.integer[Any]]
    root: Path
    missing: Sequence[str] = ()

    def listing(self) -> Listing:
        clips = ClipTable(self.root, self.keys)
        return Listing(self.name, self.version, clips, (), self.root, len(self.missing), tuple(self.missing[:20]))


def find_pictures(
    sets: Sequence[CaptionSet], split: str, captions: CaptionReader, max_missing: float, first: int | None = None
) -> Pictures:
    """The `first` images of some sets that have captions and regions; images with the same key are the same.

    A set with its own splits (COCO-CN) only adds captions to sets that show the same data set's images, because some of
    its training images are test images of the others. The released code also pools the 113,287 images of COCO [9].
    `max_missing` is the largest fraction of images without regions.
    """
    features = [one.dataset.regions(split) for one in sets]
    keys_of = [captions(one.dataset, split, one.language).captions.keys for one in sets]
    datasets: list[Any] = [one.dataset for one in sets]
    shown = {_shown(dataset) for dataset in datasets if not dataset.own_splits}
    adding = [own for own, of in zip(keys_of, datasets) if not (of.own_splits and _shown(of) in shown)]
    # A single set keeps its `keys` object, which makes later comparisons fast.
    keys: Sequence[str] = adding[0] if len(adding) == 1 else list(dict.fromkeys(key for some in adding for key in some))
    keys = keys[:first] if first is not None and first < len(keys) else keys
    total, source = len(keys), np.zeros(len(keys), dtype=np.int16)
    without = set(features[0].missing(keys))
    rows = {key: row for row, key in enumerate(keys) if key in without} if without else {}
    for number, others in enumerate(features[1:], 1):
        for key in [key for key in rows if key in others]:
            source[rows.pop(key)] = number
    if rows:
        source = np.delete(source, list(rows.values()))
        keys = Texts(key for key in keys if key not in rows)
    dataset: Any = sets[0].dataset
    name = "+".join(dict.fromkeys(one.dataset.name for one in sets))
    if len(rows) > max_missing * total or not len(keys):
        raise TooManyBrokenFiles(
            f"{name}, {split}: {len(rows)} of {total} images have no region features in "
            f"{', '.join(str(path) for path in features[0].paths)}, more than max_skipped_fraction = {max_missing:g} "
            f"allows; first {', '.join(list(rows)[:5])}. Extract them, or raise data.max_skipped_fraction"
        )
    languages = ",".join(dict.fromkeys(one.language for one in sets))
    return Pictures(name, f"{split}; {languages}", keys, features, source, dataset.root, list(rows))


def _shown(dataset: Any) -> str:
    """Name of the data set whose images a set shows."""
    return getattr(dataset, "coco", dataset).name


class RegionItems(ItemDataset):
    """Pictures as regions for evaluation: `regions` and `index`; cached if `cache_bytes` suffice for all."""

    def __init__(
        self,
        pictures: Pictures,
        max_regions: int = 100,
        cache_bytes: int = 0,
        distributions: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(pictures.listing(), **options)
        self.pictures = pictures
        self.max_regions = max_regions
        self.distributions = distributions
        numbers = len(pictures.keys) * max_regions * (pictures.features[0].feature_size + 7)
        self._cache: dict[int, RegionArrays] | None = {} if numbers * 4 <= cache_bytes else None
        if distributions:
            # Missing distributions stop the run here; damaged files are handled later.
            with contextlib.suppress(MediaError):
                self.regions(0)

    def regions(self, file: int) -> RegionArrays:
        if self._cache is not None and file in self._cache:
            return self._cache[file]
        key = self.pictures.keys[file]
        try:
            stored = self.pictures.features[int(self.pictures.source[file])][key]
        except RegionError as error:
            raise MediaError(f"{self.pictures.name}, picture {key}: {error}") from error
        if self.distributions and stored.distribution is None:
            raise ValueError(
                f"{self.pictures.name}: its region features hold one class each and no `distribution`, which "
                "data.distributions asks for; extract them with it, or set that to false"
            )
        count = self.max_regions
        distribution = stored.distribution if self.distributions else None
        regions = RegionArrays(
            stored.features[:count],
            stored.box_vectors[:count],
            stored.labels[:count],
            None if distribution is None else distribution[:count],
        )
        if self._cache is not None:
            self._cache[file] = regions
        return regions

    def _make(self, file: int, rng: np.random.Generator) -> Sample:
        return {"regions": self.regions(file)}

    def fill_cache(self) -> None:
        if self._cache is not None:
            for file in range(len(self.listing)):
                with contextlib.suppress(MediaError):  # met again, and counted, when it is asked for
                    self.regions(file)

    def preview(self, item: int) -> npt.NDArray[np.uint8]:
        raise ValueError("region features hold no picture")

    def describe(self) -> dict[str, Any]:
        missing = len(self.pictures.missing)
        return {**super().describe(), **({"without_regions": missing} if missing else {})}


def pad_regions(images: Sequence[RegionArrays], width: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Regions of several pictures in one array, padded with zeros to at least `width` rows.

    Text starts after the last region row. Its position affects the encoder's output, so it must not depend on the other
    pictures of a batch, process or data set.

    Returns:
        `features` float32 [P, R, F], `boxes` float32 [P, R, 5], `classes` int64 [P, R], `mask` bool [P, R], and
        `distribution` float32 [P, R, C] if the pictures have one.
    """
    counts = np.array([len(image.features) for image in images])
    mask = np.arange(max(int(counts.max()), width)) < counts[:, None]
    columns: dict[str, npt.NDArray[Any]] = {"mask": mask}
    for name in ("features", "boxes", "classes", "distribution"):
        rows = [getattr(image, name) for image in images]
        if rows[0] is None:
            continue
        if mask.all():
            columns[name] = np.stack(rows)
        else:
            columns[name] = np.zeros((*mask.shape, *rows[0].shape[1:]), dtype=rows[0].dtype)
            columns[name][mask] = np.concatenate(rows)
    return columns


def unit_length(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Vectors scaled to length 1; zero vectors stay zero."""
    lengths = np.sqrt(np.einsum("...f,...f->...", features, features))[..., None]
    return features / np.maximum(lengths, np.float32(1e-12))


def region_batch(images: Sequence[RegionArrays], width: int) -> dict[str, Tensor]:
    """Encoder inputs of some pictures: `regions` [B, R, F], `boxes` [B, R, 5] and `region_mask` bool [B, R]."""
    columns = pad_regions(images, width)
    return {
        "regions": torch.from_numpy(unit_length(columns["features"])),
        "boxes": torch.from_numpy(columns["boxes"]),
        "region_mask": torch.from_numpy(columns["mask"]),
    }
