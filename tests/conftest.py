"""Set-up shared by all tests."""

from __future__ import annotations

import os

# Before anything reads them: no test logs online, writes into the user's cache or starts more threads than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"

import gc
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo  # imported before workers are forked: importing it in a forked child can hang

from common.data.media import FileCache

# One thread: results do not depend on the machine's core count, and forked workers inherit no thread pool.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Files that can be made again go to a temporary folder of this run, never to the user's cache.

    The workers of a run share it: what one has rendered the others find.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["ASSEMBLE_CACHE"] = str(folder)


@pytest.fixture(autouse=True, scope="module")
def empty_caches() -> Iterator[None]:
    """What a process has decoded is dropped after each file of tests: they read other files, and a cache only grows."""
    yield
    FileCache._shared = None
    gc.collect()
