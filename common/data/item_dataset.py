"""What map-style data sets of clips and of images share: keys, seeds, and what happens with files that cannot be used.

A key is an item, or a pair (epoch, item). Everything random about a sample is drawn from a generator seeded by
(seed, epoch, item), so a sample depends neither on the worker that makes it nor on the samples before it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from common.data.listing import Listing
from common.data.media import MediaError

logger = logging.getLogger(__name__)

Key = int | tuple[int, int]
# Tensors; where an item has several views or boxes, lists of them.
Sample = dict[str, Any]


class TooManyBrokenFiles(RuntimeError):
    """More files of a data set were skipped than the run allows."""


class SkipLedger:
    """Which files of a listing could not be used, counted over all worker processes.

    Args:
        listing: The files.
        max_share: Share of the files that may be skipped before the run fails.

    Attributes:
        flags: uint8 [files] in shared memory; 1 = skipped. Ranks can combine theirs with a maximum.
    """

    def __init__(self, listing: Listing, max_share: float) -> None:
        self.listing = listing
        self.max_share = max_share
        self.flags = torch.zeros(len(listing), dtype=torch.uint8)
        if len(listing):
            self.flags.share_memory_()

    def record(self, file: int, error: MediaError) -> None:
        """Mark a file as skipped."""
        if self.flags[file]:
            return
        self.flags[file] = 1
        logger.warning("skipped %s", error)
        count = self.count()
        if count > self.max_share * len(self.flags):
            some = ", ".join(self.names()[:5])
            raise TooManyBrokenFiles(
                f"{self.listing.name}: {count} of {len(self.flags)} files cannot be used, more than "
                f"max_skipped_fraction = {self.max_share:g} allows. First: {some}. Last: {error}. Repair or remove the "
                "files, or raise max_skipped_fraction."
            )

    def count(self) -> int:
        """Number of files skipped so far."""
        return int(torch.count_nonzero(self.flags))

    def names(self) -> list[str]:
        """Skipped files, each once, relative to the listing's root where they lie under it."""
        skipped = torch.nonzero(self.flags).flatten().tolist()
        return list(dict.fromkeys(map(self.listing.table.name, skipped)))


class ItemDataset(Dataset[Sample], ABC):
    """Keys, seeds and the replacement of files that cannot be used; subclasses make the sample.

    A file that cannot be used is replaced by the next item, with that item's own index and label. An evaluation can
    tell by the index that a sample is there twice.

    Args:
        listing: The files.
        passes: Length of an epoch in passes over the listing; item i is file `i mod len(listing)`.
        seed: Seed of everything random.
        max_skipped_fraction: Share of the files that may be skipped before the run fails.
    """

    def __init__(self, listing: Listing, *, passes: int = 1, seed: int = 0, max_skipped_fraction: float = 0.05) -> None:
        if not len(listing):
            raise ValueError(f"the listing {listing.name} has no items")
        self.listing = listing
        self.passes = passes
        self.seed = seed
        self.skipped = SkipLedger(listing, max_skipped_fraction)

    def __len__(self) -> int:
        return len(self.listing) * self.passes

    def __getitem__(self, key: Key) -> Sample:
        """The sample of an item of epoch 0, or of (epoch, item)."""
        return self._usable(key, self._make)

    @abstractmethod
    def _make(self, file: int, rng: np.random.Generator) -> Sample:
        """Make the sample of a file; a :class:`MediaError` has the next item take its place."""

    @abstractmethod
    def fill_cache(self) -> None:
        """Decode the files into the cache, if there is one; those that cannot be decoded are left for later."""

    @abstractmethod
    def preview(self, item: int) -> npt.NDArray[np.uint8]:
        """A picture of a file as it is stored, [H, W, 3]."""

    def name(self, item: int) -> str:
        return self.listing.table.name(item)

    def describe(self) -> dict[str, Any]:
        """What was read, for the record: version, fingerprint and number of files."""
        return {
            "version": self.listing.version,
            "fingerprint": self.listing.fingerprint()[:16],
            "samples": len(self.listing),
        }

    def _usable(self, key: Key, make: Callable[[int, np.random.Generator], Sample]) -> Sample:
        epoch, item = key if isinstance(key, tuple) else (0, key)
        item = range(len(self))[item]
        files = len(self.listing)
        error: MediaError | None = None
        for skipped in range(files):
            current = (item + skipped) % len(self)
            file = current % files
            try:
                sample = make(file, np.random.default_rng((self.seed, epoch, current)))
            except MediaError as problem:
                error = problem
                self.skipped.record(file, problem)
                continue
            sample["index"] = torch.tensor(file)
            sample["label"] = torch.tensor(int(self.listing.labels[file]))
            sample["skipped"] = torch.tensor(skipped)
            return sample
        raise MediaError(f"no file of {self.listing.name} can be used; the last error was: {error}")
