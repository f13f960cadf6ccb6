"""Read pictures with Pillow, cache decoded ones, and make map-style data sets of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data.annotations import ImageAnnotations
from common.data.caches import FileCache
from common.data.image_transforms import Transform
from common.data.item_dataset import ItemDataset, Sample
from common.data.listing import Listing
from common.data.media import MediaError
from common.data.sequences import Rows
from common.files import parsing

Pixels = npt.NDArray[np.uint8]


class ImageError(MediaError):
    """A file cannot be decoded as a picture; the message names the file and the reason."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode the first frame to 8-bit RGB without alpha; ignores EXIF orientation, as boxes are in stored pixels."""
    path = Path(path)
    with parsing(path, ImageError), Image.open(path) as image:
        image.load()
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its samples have 32 bits and no known range; store it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns when such a palette is converted in one step.
        image = image.convert("RGBA")
    return image.convert("RGB")


class ImageCache(FileCache[Pixels]):
    """Decoded pictures in the memory of this process; pictures larger than the bound are not cached."""

    def get(self, path: Path) -> Image.Image:
        """A copy of the decoded picture."""
        try:
            key = self._key(path)
        except OSError as error:
            raise ImageError.of(path, f"cannot be read: {error.strerror or error}") from None
        found = self._find(key)
        if found is not None:
            if isinstance(found[0], str):
                raise ImageError(found[0])
            return Image.fromarray(found[0])
        try:
            image = read_image(path)
        except ImageError as error:
            self._keep(key, str(error), 0)
            raise
        # Computed before copying the pixels, because a large picture is not cached.
        size = image.width * image.height * 3
        if size <= self.max_bytes:
            self._keep(key, np.array(image), size)
        return image


class ImageItems(ItemDataset):
    """One picture per item; subclasses override :meth:`_sample`, or set `annotations` to read captions or tags.

    Args:
        seed, max_skipped_fraction: see :class:`ItemDataset`.
        cache_bytes: bound of the decoded pictures in memory, per process; 0 = no cache.
    Returns of an item:
        `image` float32 [3, crop, crop]; `label`, `index` (file of the listing), `skipped` (files passed over to get
        this sample), int64.
    """

    annotations: ImageAnnotations

    def __init__(
        self,
        listing: Listing,
        transform: Transform,
        *,
        training: bool,
        seed: int = 0,
        max_skipped_fraction: float = 0.05,
        cache_bytes: int = 0,
    ) -> None:
        super().__init__(listing, seed=seed, max_skipped_fraction=max_skipped_fraction)
        self.transform: Transform = transform.with_training(training)
        self.training = training
        self.cache = ImageCache.shared(cache_bytes) if cache_bytes else None

    def _sample(self, item: int, image: Image.Image, rng: np.random.Generator) -> Sample:
        return {"image": self.transform(image, rng)[0]}

    def _make(self, file: int, rng: np.random.Generator) -> Sample:
        return self._sample(file, self.image(file), rng)

    def image(self, item: int) -> Image.Image:
        path = self.listing[item].path
        return read_image(path) if self.cache is None else self.cache.get(path)

    def describe(self) -> dict[str, Any]:
        annotations: ImageAnnotations | None = getattr(self, "annotations", None)
        own = {} if annotations is None else {"annotations": annotations.fingerprint()[:16]}
        return {**super().describe(), **own}

    def fill_cache(self) -> None:
        if self.cache is not None:
            self.cache.fill((clip.path for clip in self.listing.clips), ImageError)

    def preview(self, item: int) -> Pixels:
        return np.array(self.image(item))


def require_captions(listing: Listing, annotations: ImageAnnotations) -> None:
    """Raise if an image has no caption."""
    captions = annotations.captions
    lengths = np.diff(captions.starts) if isinstance(captions, Rows) else np.array([len(own) for own in captions])
    without = np.flatnonzero(lengths == 0)
    if len(without):
        raise ValueError(
            f"{listing.root}: {len(without)} of {len(listing)} images have no caption, such as "
            f"{listing[int(without[0])].path}, and the model reads one of each: write them into a list "
            "(docs/own-data.md), or take a recipe that reads images alone"
        )
