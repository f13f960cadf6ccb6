"""What every data module of the suite shares: sharded, resumable loaders, and the data part of a record."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from common.data.clips import ClipDataset
from common.data.samplers import EpochSampler, ShardSampler


class ShardedDataModule(pl.LightningDataModule):
    """Base of the data modules: loaders over all ranks that a killed run can go on with.

    Args:
        batch_size: global batch; the per-device batch is derived.
        num_workers: loader processes per device.
        seed: seed of order and augmentation.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._used: dict[str, Dataset[Any]] = {}

    # -- loaders -------------------------------------------------------------------------------------------------------

    def training_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        """Loader of an epoch in an order given by (seed, epoch); goes on in the middle of one after a restart.

        Args:
            dataset: takes `(epoch, item)` keys.
        """
        trainer = self.trainer
        assert trainer is not None
        sampler = EpochSampler(
            len(dataset),  # type: ignore[arg-type]
            self.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
        )
        batches = sampler.batches_per_epoch
        if isinstance(trainer.limit_train_batches, int):
            batches = min(batches, trainer.limit_train_batches)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        finished = done >= batches  # the checkpoint was written in the last batch of its epoch
        # Lightning tells the sampler its epoch only after it has fetched the first batch, so it is told here too.
        sampler.set_epoch(trainer.fit_loop.epoch_progress.current.ready if finished else trainer.current_epoch)
        sampler.start_at(0 if finished else done)
        self._used["training"] = dataset
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=self.batch_size // trainer.world_size,
            drop_last=True,
            **self._workers(dataset),
        )

    def evaluation_loader(self, dataset: Dataset[Any], batch_size: int, role: str = "test") -> DataLoader[Any]:
        """Loader that shows every item once over all ranks, in order.

        Args:
            dataset: takes int items.
            batch_size: per device.
            role: name for the record.
        """
        trainer = self.trainer
        assert trainer is not None
        self._used[role] = dataset
        sampler = ShardSampler(len(dataset), trainer.global_rank, trainer.world_size)  # type: ignore[arg-type]
        return DataLoader(dataset, sampler=sampler, batch_size=batch_size, **self._workers(dataset))

    def _workers(self, dataset: Dataset[Any]) -> dict[str, Any]:
        workers = min(self.num_workers, os.cpu_count() or 1)
        if workers and isinstance(dataset, ClipDataset):
            # A cache filled before the fork is shared by all workers and by all stages of this process.
            dataset.fill_cache()
        accelerator = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": accelerator,
            "prefetch_factor": 4 if workers else None,
        }

    # -- record --------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, dict[str, Any]]:
        """Name, version, number of samples and skipped files of every data set that was used; called by all ranks."""
        described: dict[str, dict[str, Any]] = {}
        assert self.trainer is not None
        for role, dataset in self._used.items():
            if not isinstance(dataset, ClipDataset):
                continue
            if dist.is_available() and dist.is_initialized():
                # Every rank met other files; a file is broken when one of them found it so.
                flags = dataset.skipped.flags.to(self.trainer.strategy.root_device, torch.int32)
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
                dataset.skipped.flags.copy_(flags.cpu())
            names = dataset.skipped.names()
            described[f"{role} ({dataset.listing.name})"] = {
                "version": dataset.listing.version,
                "fingerprint": dataset.listing.fingerprint()[:16],
                "samples": len(dataset.listing),
                "skipped": len(names),
                "skipped_names": names[:20],
            }
        return described
