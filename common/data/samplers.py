"""The order of samples: seeded by the epoch, split over ranks, and resumable at any step.

Lightning's default sampler loses the state of its random generator, so the first epoch after a resume repeats the order
of epoch 0. Here, the order of an epoch depends only on (seed, epoch), so a resumed run only needs the position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, item)` keys in an order that depends only on (seed, epoch).

    Rank r of W takes items r, r + W, ... in the epoch's order. So a global batch of `batch_size` contains the same
    items on any number of ranks. An incomplete last batch is dropped, see docs/papers/avid_cma.md [9].
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"data.batch_size ({batch_size}) is the global batch and must be divisible by the number of "
                f"processes ({world_size})"
            )
        if num_samples < batch_size:
            raise ValueError(
                f"data.batch_size ({batch_size}) is larger than the {num_samples} samples of an epoch; "
                "lower data.batch_size (or, with clips, raise data.clips_per_video)"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.epoch = 0
        self._position: Callable[[], tuple[int, int]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        return self.num_samples // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def begin_at(self, position: Callable[[], tuple[int, int]]) -> None:
        """Let the next iteration call `position` and start at the returned (epoch, global batch)."""
        self._position = position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first_batch = 0
        if self._position is not None:
            # Get the epoch here, because Lightning calls set_epoch only after the first batch.
            self.epoch, first_batch = self._position()
            self._position = None
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.arange(self.num_samples)
        if self.shuffle:
            order = torch.randperm(self.num_samples, generator=generator)
        first = first_batch * self.batch_size
        last = self.batches_per_epoch * self.batch_size
        epoch = self.epoch
        for item in order[first + self.rank : last : self.world_size].tolist():
            yield epoch, item

    def __len__(self) -> int:
        """Count this rank's samples in a whole epoch, even if the next iteration starts in the middle of an epoch."""
        return self.batches_per_epoch * self.batch_size // self.world_size
