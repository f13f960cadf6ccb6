"""What loaders hold in memory: their processes and the batches in flight, at published sizes."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from common.training.data_module import MOST_AHEAD, ShardedDataModule, bytes_of, loader_processes
from tests.training.test_data_module import module

__all__ = ["module"]

#: Ten clips of 32 frames at 224 pixels, as bytes: a video of the test after fine-tuning on UCF101.
CLIPS = (10, 3, 32, 224, 224)


@given(budget=st.integers(1, 10**12), batch=st.integers(1, 10**10), wanted=st.integers(1, 64))
def test_what_is_in_flight_stays_within_the_budget(budget: int, batch: int, wanted: int) -> None:
    workers, ahead = loader_processes(budget, batch, wanted)
    assert 1 <= workers <= wanted
    assert 1 <= ahead <= MOST_AHEAD
    # Two batches are the least that one process holds.
    assert workers * (ahead + 1) * batch <= max(budget, 2 * batch)
    if workers < wanted:  # a process goes only where none is ahead any more
        assert ahead == 1 or workers * 2 * batch > budget - 2 * batch


def test_published_sizes_are_bounded() -> None:
    gigabyte = 10**9
    assert loader_processes(10 * gigabyte, 154_000_000, 8) == (8, 4)  # 32 clips a device, as the authors had
    assert loader_processes(10 * gigabyte, 616_000_000, 8) == (8, 1)  # 128 clips a device
    assert loader_processes(10 * gigabyte, 1_930_000_000, 8) == (2, 1)  # 100 clips of 32 frames as numbers
    assert loader_processes(gigabyte, 1_930_000_000, 8) == (1, 1)


def test_bytes_of_whatever_a_sample_holds() -> None:
    sample = {"video": torch.zeros(3, 4, dtype=torch.uint8), "boxes": [torch.zeros(2), torch.zeros(3)], "name": "text"}
    assert bytes_of([sample, (torch.zeros(1).numpy(), 3)]) == 12 + 20 + 4


class Growing(Dataset[Any]):
    """Samples of 1,000 bytes at the key that is measured, and of much more at any other."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: Any) -> Tensor:
        first = key in ((0, 0), 0)
        return torch.zeros(1_000 if first else 100_000, dtype=torch.uint8)


def test_processes_are_counted_for_the_batch_of_one_device(
    module: ShardedDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.data_module.usable_cores", lambda: 8)
    trainer: Any = module.trainer
    trainer.world_size, module.batch_size, module.num_workers = 2, 20, 8
    module.in_flight_bytes = 8 * 2 * 10_000  # eight processes that are one batch of ten samples ahead
    for loader in (module.training_loader(Growing()), module.evaluation_loader(Growing(), 10)):
        assert (loader.num_workers, loader.prefetch_factor) == (8, 1)
    module.in_flight_bytes -= 1
    assert module.training_loader(Growing()).num_workers == 7


class PublishedClips(Dataset[Any]):
    """Videos of the published size without a file: the memory is what is looked at."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {"video": torch.full(CLIPS, item, dtype=torch.uint8), "index": torch.tensor(item)}


def held(processes: list[int]) -> int:
    """Memory of processes alone, and the shared memory that any of them has open or mapped, each piece once."""
    private, shared = 0, {}
    for process in processes:
        root = Path(f"/proc/{process}")
        anonymous = re.search(r"Pss_Anon: +(\d+) kB", (root / "smaps_rollup").read_text())
        assert anonymous
        private += int(anonymous[1]) * 1024
        for link in (root / "fd").iterdir():
            try:
                if "/dev/shm/" in os.readlink(link) or "memfd:" in os.readlink(link):
                    status = link.stat()
                    shared[status.st_ino] = status.st_blocks * 512
            except FileNotFoundError:
                continue
        for line in (root / "maps").read_text().splitlines():
            found = re.match(r"(\w+)-(\w+) rw-s \S+ \S+ (\d+) +/dev/shm/", line)
            if found:
                size = int(found[2], 16) - int(found[1], 16)
                shared[int(found[3])] = max(size, shared.get(int(found[3]), 0))
    return private + sum(shared.values())


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_a_loader_at_published_sizes_holds_no_more_than_it_may(
    module: ShardedDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PublishedClips()
    batch = 2 * bytes_of(dataset[0])
    assert batch > 96_000_000
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    module.num_workers, module.in_flight_bytes = 8, 5 * batch
    loader = module.evaluation_loader(dataset, 2)
    assert (loader.num_workers, loader.prefetch_factor) == (2, 1)
    before = held([os.getpid()])
    most = 0
    for number, rows in enumerate(loader):
        assert rows["video"].shape == (2, *CLIPS)
        for _ in range(4):  # a slow step: the processes get as far ahead as they may
            time.sleep(0.1)
            most = max(
                most,
                held([os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]) - before,
            )
        if number == 1:
            break
    # Beside the batches in flight there is the one that the step has, and each process its own heap: 102 MB were seen
    # in a test process that had run for long.
    assert 2 * batch < most < 6 * batch + 2 * 140_000_000
