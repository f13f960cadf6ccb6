"""Measures how fast one core reads and transforms a stage's training samples."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import torch

from assemble.stages.configuration import RunConfiguration
from common.errors import StageError
from common.files import cache_folder
from common.models.finished_stage import instantiate

#: Samples per batch.
_BATCH = 4


def measure_loading(run: RunConfiguration, data: Path, seconds: float = 20.0) -> str:
    """Measure the samples per second of one thread, over at least `seconds` of CPU time after the first batch."""
    section = run.with_placeholders(DATA=str(data), RUN=str(cache_folder()))["data"]
    arguments = {**section["init_args"], "num_workers": 0, "batch_size": _BATCH}
    module = instantiate({**section, "init_args": arguments}, pl.LightningDataModule)
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    module.trainer = SimpleNamespace(
        world_size=1, global_rank=0, current_epoch=0, limit_train_batches=1.0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(epoch_progress=progress, epoch_loop=SimpleNamespace(batch_progress=progress)),
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        module.prepare_data()
        module.setup("fit")
        batches = itertools.chain.from_iterable(itertools.repeat(module.train_dataloader()))
        next(batches)
        start, before, samples = time.process_time(), _bytes_read(), 0
        while (spent := time.process_time() - start) < seconds:
            next(batches)
            samples += _BATCH
        read = (_bytes_read() - before) / samples / 1e6
    except AttributeError as error:
        raise StageError(f"{run.paper}, {run.recipe}: its data cannot be read without its model ({error})") from error
    finally:
        torch.set_num_threads(threads)
    return f"{samples / spent:.3g} samples per second on one core, {read:.2g} MB read per sample ({samples:,} samples)"


def _bytes_read() -> int:
    """Return how many bytes this process has read from files, including cached ones. Return 0 outside Linux."""
    counts = Path("/proc/self/io")
    return int(counts.read_text().split()[1]) if counts.exists() else 0
