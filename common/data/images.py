"""Map-style data sets of pictures; see :mod:`common.data.item_dataset` for keys and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from common.data.annotations import ImageAnnotations
from common.data.image_transforms import ImageTransform, SquashTransform
from common.data.item_dataset import Item, ItemDataset, Sample, together
from common.data.listing import Listing, joined
from common.data.media import FileCache, Pixels, read_image


class ImageItems(ItemDataset):
    """Reads one picture per item. Subclasses extend :meth:`read`, or set `annotations` to read captions or tags.

    Args:
        cache_bytes: memory for decoded pictures per process; 0 = no cache.
    An item holds:
        `image` float32 [3, crop, crop]; `label`; `index` (the file's position in the listing); `skipped` (number of
        unusable files skipped before this one).
    """

    annotations: ImageAnnotations

    def __init__(
        self,
        listing: Listing,
        transform: ImageTransform | SquashTransform,
        *,
        training: bool,
        cache_bytes: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(listing, **options)
        self.image_transform = transform.with_training(training)
        self.training = training
        self.cache = FileCache.shared(cache_bytes)

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        return {"image": (self.image(item.file), self.image_transform.draw(rng))}

    def transform(self, batch: list[Sample]) -> None:
        together(batch, "image", self.image_transform.together)

    def image(self, item: int) -> Image.Image:
        return read_image(joined(self.listing.root, self.listing.names[item]), self.cache)

    def describe(self) -> dict[str, Any]:
        annotations: ImageAnnotations | None = getattr(self, "annotations", None)
        extra = {} if annotations is None else {"annotations": annotations.fingerprint()[:16]}
        return {**super().describe(), **extra}

    def fill_cache(self) -> None:
        if self.cache is not None:
            self.cache.fill(range(len(self.listing)), self.image)

    def preview(self, item: int) -> Pixels:
        return np.array(self.image(item))


def require_captions(listing: Listing, annotations: ImageAnnotations) -> None:
    without = np.flatnonzero([not captions for captions in annotations.captions])
    if len(without):
        raise ValueError(
            f"{listing.root}: {len(without)} of {len(listing)} images have no caption, such as "
            f"{listing[int(without[0])].path}, but the model needs one for each: add them to metadata.csv "
            "(docs/own-data.md), or use a recipe that reads only images"
        )
