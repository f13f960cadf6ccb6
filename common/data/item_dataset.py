"""Base of the map-style data sets of clips and images: keys, seeds, and unusable files.

A key is an item number, or a pair (epoch, item number). All random numbers of a sample come from a generator seeded by
(seed, epoch, item), so a sample depends neither on the worker process nor on earlier samples.
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

#: Transform a part of a batch as soon as its decoded media reach this many bytes.
MOST_BYTES = 2**26

Key = int | tuple[int, int]
# Tensors, or lists of them for several views or boxes. Before the transform, also tuples of its arguments.
Sample = dict[str, Any]


class Item(NamedTuple):
    """Identifies a sample: a file's position in the listing, the pass over the listing (`slot`), and the epoch."""

    file: int
    slot: int = 0
    epoch: int = 0


class TooManyBrokenFiles(RuntimeError):
    """More files of a data set were skipped than the run allows."""


class SkipLedger:
    """Records which files of a listing were skipped as unusable. All worker processes share the record.

    `flags` is uint8 [files] in shared memory, 1 = skipped. Ranks merge their flags by taking the maximum.
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

    def check(self, detail: str = "") -> None:
        """Raise `TooManyBrokenFiles` if more than the allowed fraction of files was skipped."""
        count = self.count()
        if count > self.max_share * len(self.flags):
            some = ", ".join(self.names()[:5])
            raise TooManyBrokenFiles(
                f"{self.listing.name}: {count} of {len(self.flags)} files cannot be used, more than "
                f"max_skipped_fraction = {self.max_share:g} allows. First: {some}.{detail} Repair the files "
                "and rerun to resume, or raise max_skipped_fraction, which starts again."
            )

    def count(self) -> int:
        return int(torch.count_nonzero(self.flags))

    def names(self) -> list[str]:
        """Return the names of skipped files, relative to the listing's root where possible."""
        skipped = torch.nonzero(self.flags).flatten().tolist()
        return list(dict.fromkeys(self.listing.names[file] for file in skipped))


class ItemDataset(Dataset[Sample], ABC):
    """Base that handles keys, seeds and unusable files. Subclasses read samples and transform batches.

    If a file is unusable, the sample of the next item replaces it, with the next item's index and label. So an
    evaluation can detect duplicates by index. Item i is file `i mod len(listing)`, and an epoch visits each file
    `passes` times. The run fails if more than `max_skipped_fraction` of the files are unusable.
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

    @final  # because loaders call `__getitems__`
    def __getitem__(self, key: Key) -> Sample:
        """Return the sample of an (epoch, item) key; a plain item number means epoch 0."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """Return the samples of a batch. The samples share memory: clone tensors that you keep."""
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
        """Decode a file and draw all random numbers. After a :class:`MediaError`, the next item is read instead."""

    def transform(self, batch: list[Sample]) -> None:
        """Transform samples from :meth:`read` in place. A whole batch at once is faster for small pictures."""

    @abstractmethod
    def fill_cache(self) -> None:
        """Decode files into the cache, if it is enabled. Ignore files that cannot be read."""

    @abstractmethod
    def preview(self, item: int) -> npt.NDArray[np.uint8]:
        """Return a picture of a file at its stored size, [H, W, 3]."""

    def name(self, item: int) -> str:
        return self.listing.names[item]

    def describe(self) -> dict[str, Any]:
        """Describe the files for the record: version, fingerprint, number of samples and of missing files, notes."""
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
    """Call a function once for a whole batch. Replace each sample's arguments, a tuple under `name`, by the result."""
    if batch:
        results = function(*zip(*(sample[name] for sample in batch), strict=True))
        for sample, result in zip(batch, results, strict=True):
            sample[name] = result
