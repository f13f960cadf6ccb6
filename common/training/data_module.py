"""Base of every data module: sharded, resumable loaders, and a description of the data for the record."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.data import DataLoader, Dataset, Subset

from common.data.item_dataset import ItemDataset
from common.data.samplers import EpochSampler
from common.data.text import CaptionTokenizer
from common.data.worlds.base import World
from common.files import usable_cores
from common.types import Fraction, NonNegativeInt, PositiveInt

# Turns a list of samples into a batch; None stacks tensors of the same shape.
Collate = Callable[[list[Any]], Any]

#: Fewest and most batches that each loader process prefetches: with fewer it idles, and more didn't help.
LEAST_AHEAD, MOST_AHEAD = 2, 4


class LateLoader(DataLoader[Any]):
    """Starts its processes only at the first batch, because Lightning creates iterators before loading checkpoints."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


class PartsLoader(DataLoader[Any]):
    """Joins each batch from parts that loader processes make. This saves memory. Prepares one batch ahead.

    Args:
        kind: loader class for the parts.
        part: samples per part, a divisor of the batch size.
        stacked: whether samples are tensors of one shape. If so, parts are copied into the batch as they arrive.
        options: arguments for a loader that makes whole batches.
    """

    def __init__(
        self, kind: type[DataLoader[Any]], dataset: Dataset[Any], part: int, stacked: bool, **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self.stacked = stacked
        self.count = options["batch_size"] // part
        of_parts = {"batch_size": part, "collate_fn": None if stacked else list, "pin_memory": False}
        self.parts = kind(dataset, **{**options, **of_parts})

    def __iter__(self) -> Any:
        return self._batches(iter(self.parts))

    def _batches(self, parts: Iterator[Any]) -> Iterator[Any]:
        parts = itertools.chain(list(itertools.islice(parts, 1)), parts)  # starts the processes in this thread
        with ThreadPoolExecutor(1) as thread:
            done = [self._join(parts)]
            while done[0] is not None:
                ahead = thread.submit(self._join, parts)
                yield done.pop()  # keep no reference to the batch
                done.append(ahead.result())

    def _join(self, parts: Iterator[Any]) -> Any:
        """Return the next batch, or None after the last one."""
        parts = itertools.islice(parts, self.count)
        if not self.stacked:
            samples = list(itertools.chain.from_iterable(parts))
            batch = self.collate_fn(samples) if samples else None
            return tree_map_only(torch.Tensor, torch.Tensor.pin_memory, batch) if self.pin_memory else batch
        rows: list[torch.Tensor] = []
        filled = 0
        for part in parts:
            leaves, form = tree_flatten(part)
            rows = rows or [
                leaf.new_empty((self.batch_size, *leaf.shape[1:]), pin_memory=self.pin_memory) for leaf in leaves
            ]
            for row, leaf in zip(rows, leaves):
                row[filled : filled + len(leaf)] = leaf
            filled += len(leaves[0])
        return tree_unflatten([row[:filled] for row in rows], form) if filled else None


class ShardedDataModule(pl.LightningDataModule):
    """Base of the data modules: holds a data set, or a miniature of it, and makes resumable loaders.

    Args:
        dataset: the data set, whose files are in `root`. None if the module reads several data sets.
        world: miniature that replaces the data set's files. None for real data.
        batch_size: size of the global batch, which is divided by the number of devices.
        num_workers: loader processes per device.
        cache_bytes: memory for decoded files. 0 decodes files every time.
        in_flight_bytes: memory per node for batches that loader processes prepare; see `loader_plan`.
        max_skipped_fraction: the run fails if more than this share of the files is broken.

    Attributes:
        tokenizer: a `CaptionTokenizer` or None. Checkpoints store a learned vocabulary.
    """

    trainer: pl.Trainer  # Lightning sets it before it asks for a loader.
    tokenizer: Any = None

    def __init__(
        self,
        dataset: Any = None,
        world: World | None = None,
        *,
        batch_size: PositiveInt,
        num_workers: NonNegativeInt = 8,
        seed: NonNegativeInt = 0,
        cache_bytes: NonNegativeInt = 0,
        in_flight_bytes: PositiveInt = 16_000_000_000,
        max_skipped_fraction: Fraction = 0.01,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.world = world
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_bytes = cache_bytes
        self.in_flight_bytes = in_flight_bytes
        self.max_skipped_fraction = max_skipped_fraction
        self._used: dict[str, Dataset[Any]] = {}
        self._training: dict[str, str] = {}  # role to fingerprint
        self._before: dict[str, tuple[str, Tensor]] = {}
        if dataset is not None and world is not None:
            world.place(dataset)

    def prepare_data(self) -> None:
        if self.world is not None:
            self.world.prepare(None if self.dataset is None else (self.dataset.name,))

    @property
    def credit(self) -> str:
        """Return the attribution to print under figures with these images. It may be empty."""
        return "" if self.world is None else self.world.credit

    @property
    def item_options(self) -> dict[str, Any]:
        return {"seed": self.seed, "max_skipped_fraction": self.max_skipped_fraction, "cache_bytes": self.cache_bytes}

    # -- loaders -------------------------------------------------------------------------------------------------------

    def training_loader(
        self, dataset: Dataset[Any], collate_fn: Collate | None = None, batches_at_once: int = 1
    ) -> DataLoader[Any]:
        """Return a loader whose order depends only on (seed, epoch), so a run can resume within an epoch.

        Args:
            dataset: takes `(epoch, item)` keys, like every `ItemDataset`.
            batches_at_once: number of batches that the loader joins. The training step splits them again.
        """
        trainer = self.trainer
        if self.batch_size % trainer.world_size:
            # Check single batches, because the sampler only sees `batches_at_once` of them together.
            raise ValueError(
                f"data.batch_size ({self.batch_size}) is the global batch and must be divisible by the number of "
                f"processes ({trainer.world_size})"
            )
        sampler = EpochSampler(
            len(dataset),  # type: ignore[arg-type]
            batches_at_once * self.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
        )
        self._resume(sampler)
        self.note_training_set("training", dataset)
        batch_size = batches_at_once * self.batch_size // trainer.world_size
        return self.loader(dataset, sampler, batch_size, collate_fn, LateLoader, (0, 0))

    def note_training_set(self, role: str, dataset: Dataset[Any]) -> None:
        """Register a training set. A resumed run fails if files were added or removed since it began."""
        items = self._use(role, dataset)
        if items is None:
            return
        self._training[role] = items.listing.fingerprint()
        if role not in self._before:
            return
        fingerprint, skipped = self._before[role]
        if fingerprint != self._training[role]:
            raise ValueError(
                f"{items.listing.root}: files were added or removed since this run began. Restore them to resume, or "
                f"move {self.trainer.default_root_dir} away to start again"
            )
        items.skipped.flags[skipped] = 1

    def _use(self, role: str, dataset: Dataset[Any]) -> ItemDataset | None:
        self._used[role] = dataset
        items = _items_of(dataset)
        if items is not None and (missing := items.listing.missing):
            some = ", ".join(items.listing.missing_names[:2])
            rank_zero_warn(f"{items.listing.name}: {missing:,} listed items are missing and left out, such as {some}")
        return items

    def step_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        """Return a resumable loader for a data set of whole batches, with `(epoch, step)` keys."""
        sampler = EpochSampler(len(dataset), 1, self.seed, shuffle=False)  # type: ignore[arg-type]
        self._resume(sampler)
        return self.loader(dataset, sampler, None, None, LateLoader, (0, 0))

    def _resume(self, sampler: EpochSampler) -> None:
        trainer = self.trainer

        def position() -> tuple[int, int]:
            """Return the epoch and batch to start at. Called when iteration begins, after the checkpoint is loaded."""
            batches = sampler.batches_per_epoch
            if isinstance(trainer.limit_train_batches, int):
                batches = min(batches, trainer.limit_train_batches)
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            if done >= batches:  # the checkpoint was written in the last batch of its epoch
                return trainer.fit_loop.epoch_progress.current.ready, 0
            return trainer.current_epoch, done

        sampler.begin_at(position)

    def evaluation_loader(
        self, dataset: Dataset[Any], batch_size: int, role: str = "test", collate_fn: Collate | None = None
    ) -> DataLoader[Any]:
        """Return a loader that yields every item once over all ranks, in order. `batch_size` is per device."""
        trainer = self.trainer
        self._use(role, dataset)
        # Some ranks have one item more, so an evaluation step must not wait for the others.
        sampler = range(trainer.global_rank, len(dataset), trainer.world_size)  # type: ignore[arg-type]
        return self.loader(dataset, sampler, batch_size, collate_fn)

    def loader(
        self,
        dataset: Dataset[Any],
        sampler: Iterable[Any],
        batch_size: int | None,
        collate_fn: Collate | None,
        kind: type[DataLoader[Any]] = DataLoader,
        key: Any = 0,
    ) -> DataLoader[Any]:
        """Return a loader with as many processes as memory allows. The sample `key` is used to estimate memory."""
        workers, ahead, part = min(self.num_workers, usable_cores()), None, batch_size
        items = _items_of(dataset)
        if workers and items is not None:
            # A cache filled before the fork is shared by all workers and by all stages of this process.
            items.fill_cache()
        if workers:
            # Making a sample here doesn't change later ones, because it depends only on its key.
            sample = dataset[key]
            stacked = collate_fn is None and all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(sample))
            budget = self.in_flight_bytes // self.trainer.num_devices
            workers, ahead, part, _ = loader_plan(budget, bytes_of(sample), batch_size or 1, workers, stacked)
        options: dict[str, Any] = {
            "sampler": sampler,
            "batch_size": batch_size,
            "collate_fn": collate_fn,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": self.trainer.strategy.root_device.type == "cuda",
            "prefetch_factor": ahead,
            "worker_init_fn": outlive_signals,
        }
        if batch_size and part and part < batch_size:
            return PartsLoader(kind, dataset, part, stacked, **options)
        return kind(dataset, **options)

    # -- record --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return fingerprint and skipped files of each training set, and a learned vocabulary. All ranks must call."""
        state: dict[str, Any] = {
            role: (self._training[role], items.skipped.flags.nonzero().flatten())
            for role, _, items in self._combined()
            if role in self._training
        }
        return state | (self.tokenizer.state() if isinstance(self.tokenizer, CaptionTokenizer) else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = state
        if isinstance(self.tokenizer, CaptionTokenizer):
            self.tokenizer.restore(state)

    def _combined(self) -> Iterator[tuple[str, Dataset[Any], ItemDataset]]:
        """Yield role, data set and items. First merge the skipped files of all ranks, and check how many there are."""
        for role, dataset in self._used.items():
            items = _items_of(dataset)
            if items is None:
                continue
            if dist.is_available() and dist.is_initialized():
                flags = items.skipped.flags.to(self.trainer.strategy.root_device, torch.int32)
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
                items.skipped.flags[flags.cpu().bool()] = 1  # keep the flags that loader processes set meanwhile
                items.skipped.check()
            yield role, dataset, items

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return name, version, number of samples and skipped files of every data set. All ranks must call this."""
        described: dict[str, dict[str, Any]] = {}
        for role, dataset, items in self._combined():
            names = items.skipped.names()
            described[f"{role} ({items.listing.name})"] = {
                **items.describe(),
                **({"samples": len(dataset)} if isinstance(dataset, Subset) else {}),
                "skipped": len(names),
                "skipped_names": names[:20],
            }
        return described


def outlive_signals(worker: int) -> None:
    """Keep a loader process alive until the parent process stops it or dies.

    SLURM, `timeout` and terminals signal every process, but the main process needs its loaders to finish a step and
    save. A thread waits for the parent's SIGTERM, because Python signal handlers don't run during C code.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        starter = multiprocessing.parent_process()  # known even if it has died
        threading.Thread(target=_end_with, args=(starter and starter.pid,), daemon=True).start()


def _end_with(parent: int | None) -> None:
    sender = None
    while os.getppid() == parent != sender:
        information = signal.sigtimedwait([signal.SIGTERM], 1.0)
        sender = information and information.si_pid
    os._exit(0)


class LoaderPlan(NamedTuple):
    """A loader's number of processes, prefetched parts per process, samples per part, and peak memory in bytes."""

    workers: int
    ahead: int
    part: int
    held: int


def loader_plan(budget: int, sample_bytes: int, batch_size: int, workers: int, stacked: bool = True) -> LoaderPlan:
    """Fit a loader into `budget` bytes per device. Each process holds its prefetched parts and the part in progress.

    If two prefetched batches per process do not fit, processes make parts of batches. The main process then holds the
    joined batch (if not `stacked`, also the samples and a pinned copy). The number of processes is reduced last.
    """
    sample, batch = max(sample_bytes, 1), max(batch_size * sample_bytes, 1)
    whole = min(budget // (workers * batch) - 1, MOST_AHEAD)
    if whole >= LEAST_AHEAD:
        return LoaderPlan(workers, whole, batch_size, workers * (whole + 1) * batch)
    joined = 0 if batch_size == 1 else batch if stacked else 3 * batch
    for ahead in range(LEAST_AHEAD, 0, -1):
        if most := max(budget - joined, 0) // (workers * (ahead + 1) * sample):
            part = max(size for size in range(1, min(most, batch_size) + 1) if batch_size % size == 0)
            return LoaderPlan(workers, ahead, part, workers * (ahead + 1) * part * sample + joined)
    workers = max((budget - joined) // (2 * sample), 1)
    return LoaderPlan(workers, 1, 1, workers * 2 * sample + joined)


def bytes_of(sample: Any) -> int:
    """Count the bytes of all tensors and arrays in a nested sample."""
    held = 0
    for leaf in tree_leaves(sample):
        if dataclasses.is_dataclass(leaf):
            held += bytes_of(vars(leaf))
        elif isinstance(leaf, torch.Tensor | np.ndarray):
            held += leaf.nbytes
    return held


def _items_of(dataset: Dataset[Any]) -> ItemDataset | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset if isinstance(dataset, ItemDataset) else None
