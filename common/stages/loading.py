"""How fast a core of this machine reads and transforms a stage's training samples."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import torch

from common.errors import StageError
from common.files import cache_folder
from common.stages.configuration import RunConfiguration
from common.stages.finished_stage import instantiate

#: Samples of a batch that is read at once.
_BATCH = 4


@dataclass(frozen=True)
class Loading:
    """Cost of a sample on one core: `seconds` of CPU time, and `bytes_read` from files if the system reports it."""

    seconds: float
    bytes_read: float | None
    samples: int

    def describe(self) -> str:
        disk = "" if self.bytes_read is None else f", {self.bytes_read / 1e6:.2g} MB read for each"
        return f"{1 / self.seconds:.3g} samples a second on a core{disk} ({self.samples:,} samples)"


def measure_loading(run: RunConfiguration, data: Path, seconds: float = 20.0) -> Loading:
    """Read training samples on one thread for `seconds` of CPU time at least, not counting the first batch."""
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
        while time.process_time() - start < seconds:
            next(batches)
            samples += _BATCH
        spent, after = time.process_time() - start, _bytes_read()
    except AttributeError as error:
        raise StageError(f"{run.paper}, {run.recipe}: its data cannot be read without its model ({error})") from error
    finally:
        torch.set_num_threads(threads)
    return Loading(spent / samples, None if before is None or after is None else (after - before) / samples, samples)


def _bytes_read() -> int | None:
    """Bytes that this process has read from files, cached or not; None outside Linux."""
    counts = Path("/proc/self/io")
    return int(counts.read_text().split()[1]) if counts.exists() else None
