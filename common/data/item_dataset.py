"""Base of the map-style data sets of clips and images: keys, seeds, and unusable files.

A key is an item, or a pair (epoch, item). A generator seeded by (seed, epoch, item) makes all random draws of a sample,
so a sample depends neither on its worker nor on earlier samples.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from common.data.listing import Listing
from common.data.media import MediaError, bytes_of

logger = logging.getLogger(__name__)

#: Samples of a batch are transformed once their decoded frames, sounds and pictures take this many bytes.
MOST_BYTES = 2**26

Key = int | tuple[int, int]
# Tensors, or lists of them for several views or boxes. Before the transform also tuples: its arguments.
Sample = dict[str, Any]


class Item(NamedTuple):
    """A file, which of its visits in the epoch this is, and the epoch."""

    file: int
    slot: int = 0
    epoch: int = 0


class TooManyBrokenFiles(RuntimeError):
    """More files of a data set were skipped than the run allows."""


class SkipLedger:
    """The files of a listing that could not be used, over all worker processes.

    `flags` is uint8 [files] in shared memory, 1 = skipped; ranks can combine theirs with a maximum.
    """

    def __init__(self, listing: Listing, max_share: float) -> None:
        self.listing = listing
        self.max_share = max_share
        self.flags = torch.zeros(len(listing), dtype=torch.uint8).share_memory_()

    def record(self, file: int, error: MediaError) -> None:
        if self.flags[file]:
            return
        self.flags[file] = 1
        logger.warning("skipped %s", error)
        self.check(f" Last: {error}.")

    def check(self, more: str = "") -> None:
        """Raise if too many files were skipped."""
        count = self.count()
        if count > self.max_share * len(self.flags):
            some = ", ".join(self.names()[:5])
            raise TooManyBrokenFiles(
                f"{self.listing.name}: {count} of {len(self.flags)} files cannot be used, more than "
                f"max_skipped_fraction = {self.max_share:g} allows. First: {some}.{more} Repair the files "
                "and rerun to resume, or raise max_skipped_fraction, which starts again."
            )

    def count(self) -> int:
        return int(torch.count_nonzero(self.flags))

    def names(self) -> list[str]:
        """Skipped files, relative to the listing's root if they are under it."""
        skipped = torch.nonzero(self.flags).flatten().tolist()
        return list(dict.fromkeys(self.listing.names[file] for file in skipped))


class ItemDataset(Dataset[Sample], ABC):
    """Keys, seeds and the replacement of unusable files; subclasses read a sample and transform a batch.

    The next item replaces an unusable file and keeps its index and label, so an evaluation can detect duplicates by
    index. Item i is file `i mod len(listing)`; an epoch has `passes` passes. The run fails if more than
    `max_skipped_fraction` of the files are unusable.
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

    @final  # loaders call `__getitems__`
    def __getitem__(self, key: Key) -> Sample:
        """The sample of an item of epoch 0, or of (epoch, item)."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """The samples of a batch; they share memory, so clone what you keep."""
        samples: list[Sample] = []
        done = waiting = 0
        for key in keys:
            samples.append(self._usable(key))
            waiting += sum(
                bytes_of(part) for value in samples[-1].values() if isinstance(value, tuple) for part in value
            )
            if waiting >= MOST_BYTES or len(samples) == len(keys):
                self.transform(samples[done:])
                done, waiting = len(samples), 0
        for name in ("index", "label", "skipped"):
            for sample, number in zip(samples, torch.tensor([sample[name] for sample in samples])):
                sample[name] = number
        return samples

    @abstractmethod
    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        """Decode a file and make all random draws; on a :class:`MediaError`, the next item replaces it."""

    def transform(self, batch: list[Sample]) -> None:
        """Transform what :meth:`read` returned, in place; takes less time together if pictures are small."""

    @abstractmethod
    def fill_cache(self) -> None:
        """Decode files into the cache, if there is one; ignores files that fail."""

    @abstractmethod
    def preview(self, item: int) -> npt.NDArray[np.uint8]:
        """A picture of a file as it is stored, [H, W, 3]."""

    def name(self, item: int) -> str:
        return self.listing.names[item]

    def describe(self) -> dict[str, Any]:
        """Version, fingerprint and number of files, and what the listing lacks, for the record."""
        listing = self.listing
        lacking = {"missing": listing.missing, "notes": list(listing.notes)}
        return {
            "version": listing.version,
            "fingerprint": listing.fingerprint()[:16],
            "samples": len(listing),
            **{name: value for name, value in lacking.items() if value},
        }

    def _usable(self, key: Key) -> Sample:
        epoch, number = key if isinstance(key, tuple) else (0, key)
        number = range(len(self))[number]
        files = len(self.listing)
        error: MediaError | None = None
        for skipped in range(files):
            current = (number + skipped) % len(self)
            slot, file = divmod(current, files)
            try:
                sample = self.read(Item(file, slot, epoch), np.random.default_rng((self.seed, epoch, current)))
            except MediaError as problem:
                error = problem
                self.skipped.record(file, problem)
                continue
            return {**sample, "index": file, "label": int(self.listing.labels[file]), "skipped": skipped}
        raise MediaError(f"no file of {self.listing.name} can be used; the last error was: {error}")


def together(batch: Sequence[Sample], name: str, function: Callable[..., Sequence[Any]]) -> None:
    """Replace the arguments of a function in each sample by its result; it takes those of all samples as sequences."""
    if batch:
        results = function(*zip(*(sample[name] for sample in batch), strict=True))
        for sample, result in zip(batch, results, strict=True):
            sample[name] = result
