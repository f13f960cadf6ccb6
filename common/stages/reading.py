"""How fast this machine makes the samples that a stage trains on, and whether that is enough for a card.

Samples are read and transformed by the stage's own data module, in one process on one thread, and counted by CPU time:
loader processes are as many times as fast, up to the cores and the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

from common.errors import StageError
from common.files import cache_folder, write_atomically
from common.reporting import records
from common.stages.configuration import RunConfiguration
from common.stages.lean import import_lightning

#: What of a data module's arguments says nothing about the cost of a sample.
_OTHER = {"batch_size", "num_workers", "seed", "in_flight_bytes", "clips_per_video"}
#: Samples of a batch that is read at once.
_BATCH = 4


@dataclass(frozen=True)
class Reading:
    """What a sample costs on one core.

    Attributes:
        seconds: CPU time.
        bytes_read: from files; None where the system does not tell.
        samples: how many were read.
        cpu, date: of the machine, and when.
    """

    seconds: float
    bytes_read: float | None
    samples: int
    cpu: str
    date: str

    def describe(self) -> str:
        """In one line."""
        disk = "" if self.bytes_read is None else f", {self.bytes_read / 1e6:.2g} MB read for each"
        return f"{1 / self.seconds:.3g} samples a second on a core{disk} ({self.cpu}, {self.date})"


def measure_reading(run: RunConfiguration, data: Path, seconds: float = 20.0) -> Reading:
    """Read training samples for some seconds, and keep what was found.

    Args:
        run: the stage's configuration.
        data: folder of the data sets.
        seconds: CPU time at least; the first batch, which opens files and fills caches, is not counted.

    Raises:
        StageError: its data need more than the data module.
        DatasetMissing: they are not there.
    """
    import_lightning()
    import lightning.pytorch as pl
    import torch

    from common.stages.finished import instantiate

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
        start, read, samples = time.process_time(), _read_so_far(), 0
        while time.process_time() - start < seconds:
            next(batches)
            samples += _BATCH
        spent = time.process_time() - start
    except AttributeError as error:
        raise StageError(f"{run.paper}, {run.recipe}: its data cannot be read without its model ({error})") from error
    finally:
        torch.set_num_threads(threads)
    taken = None if read is None else ((_read_so_far() or read) - read) / samples
    found = Reading(spent / samples, taken, samples, str(records.hardware()["cpu"]), f"{datetime.now(UTC):%Y-%m-%d}")
    write_atomically(_path(run), json.dumps(asdict(found), indent=1, sort_keys=True) + "\n")
    return found


def kept_reading(run: RunConfiguration) -> Reading | None:
    """What was last measured here for data that are read in the same way; None without."""
    try:
        return Reading(**json.loads(_path(run).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def wanted(run: RunConfiguration, pace: Mapping[str, float], reading: Reading | None) -> str:
    """What a stage wants to be fed, in one line, and what that takes by a measurement.

    Args:
        run: the stage's configuration.
        pace: name of a card to samples a second of all devices together.
        reading: of this machine.
    """
    fast = "; ".join(f"{card} {samples:,.0f}" for card, samples in pace.items())
    line = f"{run.recipe} takes samples a second, all devices together: {fast}"
    if reading is None:
        return line
    most = max(pace.values())
    cores = math.ceil(most * reading.seconds)
    disk = "" if reading.bytes_read is None else f" and {most * reading.bytes_read / 1e6:,.0f} MB/s of files"
    text = f"{line}. Here: {reading.describe()}, so at most {cores} cores of this kind{disk}"
    trainer, loaders = run.config["trainer"], int(run.config["data"]["init_args"].get("num_workers", 8))
    with contextlib.suppress(TypeError, ValueError):
        processes = loaders * int(trainer.get("devices", 1)) * int(trainer.get("num_nodes", 1))
        if processes < cores:
            text += (
                f"; its {processes} loader processes make {processes / reading.seconds:,.0f}: raise data.num_workers"
            )
    return text


def reads_as(run: RunConfiguration) -> str:
    """Digest of all that the cost of a sample depends on; stages with the same one are read in the same way."""
    section = run.config["data"]
    arguments = {name: value for name, value in (section.get("init_args") or {}).items() if name not in _OTHER}
    text = json.dumps([section["class_path"], arguments], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _path(run: RunConfiguration) -> Path:
    return cache_folder() / "reading" / f"{run.paper}-{reads_as(run)}.json"


def _read_so_far() -> int | None:
    """Bytes that this process has read from files, cached by the system or not."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines():
            if line.startswith("rchar:"):
                return int(line.partition(":")[2])
    return None
