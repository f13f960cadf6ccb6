"""Images as regions of detected objects."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.item_dataset import Item, ItemDataset, Sample, TooManyBrokenFiles
from common.data.listing import UNLABELED, Listing, file_names
from common.data.media import MediaError
from common.data.regions import RegionError, RegionFeatures, Regions
from common.data.sequences import Texts
from papers.m3p.captions import CaptionTokens


def find_images(
    captions: Sequence[CaptionTokens], max_missing: float, first: int | None = None
) -> tuple[Listing, Sequence[str], RegionFeatures]:
    """Find the images of some captions that have regions. Return listing, keys, and features by key.

    Read only the `first` images, and accept up to a fraction `max_missing` of images without regions. Data sets share
    the images with the same key. A data set with its own split of COCO's images (COCO-CN) adds captions to COCO, but no
    images, because some of its training images are COCO's test images. The released code also pools 113,287 images of
    COCO [9].
    """
    datasets: list[Any] = [tokens.dataset for tokens in captions]
    split = captions[0].split
    paths = tuple(dict.fromkeys(path for dataset in datasets for path in dataset.region_paths(split)))
    features = datasets[0].regions(split)
    if paths != features.paths:
        features = RegionFeatures(paths, datasets[0].region_keys)
    sources = [getattr(dataset, "coco", dataset).name for dataset in datasets]
    whole = {source for source, dataset in zip(sources, datasets) if not dataset.own_splits}
    adding = [
        tokens.captions.keys
        for source, dataset, tokens in zip(sources, datasets, captions)
        if not (dataset.own_splits and source in whole)
    ]
    # Keep the `keys` object of a single set, which makes later comparisons fast.
    keys: Sequence[str] = adding[0] if len(adding) == 1 else list(dict.fromkeys(key for keys in adding for key in keys))
    keys = keys[:first] if first is not None and first < len(keys) else keys
    total, missing = len(keys), features.missing(keys)
    if missing:
        lacking = set(missing)
        keys = Texts(key for key in keys if key not in lacking)
    name = "+".join(dict.fromkeys(dataset.name for dataset in datasets))
    if len(missing) > max_missing * total or not len(keys):
        raise TooManyBrokenFiles(
            f"{name}, {split}: {len(missing)} of {total} images have no region features in "
            f"{', '.join(map(str, paths))}, more than {100 * max_missing:g} %; first {', '.join(missing[:5])}. Extract "
            "them, or for training raise data.max_skipped_fraction"
        )
    languages = ",".join(dict.fromkeys(tokens.captions.language for tokens in captions))
    listing = Listing(
        name, f"{split}; {languages}", datasets[0].root, (), file_names(keys), np.full(len(keys), UNLABELED),
        missing=len(missing), missing_names=tuple(missing[:20]),
    )  # fmt: skip
    return listing, keys, features


class RegionItems(ItemDataset):
    """The images of some captions as regions: `regions` and `index`. Caches all if `cache_bytes` is large enough.

    Args:
        first, max_skipped_fraction: see `find_images`.
    """

    def __init__(
        self,
        captions: Sequence[CaptionTokens],
        max_regions: int,
        max_skipped_fraction: float,
        first: int | None = None,
        cache_bytes: int = 0,
        distributions: bool = False,
        **options: Any,
    ) -> None:
        listing, self.keys, self.features = find_images(captions, max_skipped_fraction, first)
        super().__init__(listing, max_skipped_fraction=max_skipped_fraction, **options)
        self.max_regions = max_regions
        self.distributions = distributions
        numbers = len(self.keys) * max_regions * (self.features.feature_size + 7)
        self._cache: dict[int, Regions] | None = {} if numbers * 4 <= cache_bytes else None

    def regions(self, image: int) -> Regions:
        if self._cache is not None and image in self._cache:
            return self._cache[image]
        key = self.keys[image]
        try:
            stored = self.features[key]
        except RegionError as error:
            raise MediaError(f"{self.listing.name}, picture {key}: {error}") from error
        if self.distributions and stored.distribution is None:
            raise ValueError(
                f"{self.listing.name}: data.distributions is true, but the region features have no `distribution`; "
                "extract them with it, or set data.distributions to false"
            )
        regions = stored.first(self.max_regions, self.distributions)
        if self._cache is not None:
            self._cache[image] = regions
        return regions

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        return {"regions": self.regions(item.file)}

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Make a batch of images: the fields that `region_batch` returns, and `index` [B]."""
        index = torch.stack([sample["index"] for sample in samples])
        return region_batch([sample["regions"] for sample in samples], self.max_regions) | {"index": index}

    def fill_cache(self) -> None:
        if self._cache is not None:
            for file in range(len(self.listing)):
                with contextlib.suppress(MediaError):  # `read` raises the error again and counts it
                    self.regions(file)

    def preview(self, item: int) -> npt.NDArray[np.uint8]:
        raise ValueError("region features hold no picture")


def region_batch(images: Sequence[Regions], rows: int) -> dict[str, Tensor]:
    """Turn images into encoder inputs: `regions` [B, R, F], `boxes` [B, R, 5] and `region_mask` bool [B, R]."""
    columns = pad_regions(images, rows)
    return {name: torch.from_numpy(columns[name]) for name in ("regions", "boxes", "region_mask")}


def pad_regions(images: Sequence[Regions], rows: int) -> dict[str, npt.NDArray[Any]]:
    """Stack the regions of several images, padded with zeros to `rows` each.

    Text starts after the last region row. Its position affects the encoder's output, so it must not depend on the other
    images of a batch, process or data set.

    Returns:
        `region_mask` bool [P, R], `features` float32 [P, R, F], the same of length 1 as `regions`, `boxes` float32 [P,
        R, 5], `classes` int64 [P, R], and `distribution` float32 [P, R, C] if the images have it.
    """
    mask = np.arange(rows) < np.array([len(image) for image in images])[:, None]
    columns: dict[str, npt.NDArray[Any]] = {"region_mask": mask}
    for name, of in (
        ("features", "features"), ("boxes", "box_vectors"), ("classes", "labels"), ("distribution", "distribution")
    ):  # fmt: skip
        parts = [getattr(image, of) for image in images]
        if parts[0] is not None:
            columns[name] = np.zeros((*mask.shape, *parts[0].shape[1:]), dtype=parts[0].dtype)
            columns[name][mask] = np.concatenate(parts)
    features = columns["features"]
    lengths = np.sqrt(np.einsum("...f,...f->...", features, features))[..., None]
    columns["regions"] = features / np.maximum(lengths, np.float32(1e-12))
    return columns
