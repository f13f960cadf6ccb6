"""Set up what all tests share."""

# ruff: noqa: E402

from __future__ import annotations

import os

# Set environment variables before any import reads them. Tests must not log to W&B by default, write into the user's
# cache, or start several threads.
for name in [one for one in os.environ if one.startswith(("ASSEMBLE_", "WANDB_", "SLURM_", "FORCE_COLOR", "NO_COLOR"))]:
    if name != "ASSEMBLE_TESTS_HAVE":  # set by the developer
        del os.environ[name]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB__SERVICE_WAIT"] = "600"
os.environ["MPLBACKEND"] = "Agg"

import functools
import gc
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # before workers are forked, because importing it in a forked child can hang
from hypothesis import HealthCheck, Phase, settings
from PIL import Image

from common.data.media import FileCache

#: Folders with the slowest files. These start first, so that no worker is still busy when the others are finished.
SLOWEST = ("resume", "running", "distributed", "faults", "cli", "training")

#: These files start autograd's threads, after which a forked process cannot train. They run last.
LAST = ("test_estimate.py", "test_gpu_check.py")

# With one thread, results don't depend on the number of cores, and forked workers inherit no thread pool.
torch.set_num_threads(1)

# Every run tries the same examples, and a slow machine causes no failure.
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
# For `make mutation`: don't shrink failing examples.
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (item.path.name in LAST, item.path.parent.name not in SLOWEST))


def pytest_collection_finish() -> None:
    """Let the garbage collector skip all modules, because they cost half a second after each stage and test file."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a temporary cache folder for this run, never the user's cache.

    All pytest workers share this folder, so each file is rendered or trained only once.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ.update(ASSEMBLE_CACHE=str(base / "cache"), ASSEMBLE_TESTS=str(base / "trained"))
    Path(os.environ["ASSEMBLE_CACHE"]).mkdir(exist_ok=True)


@pytest.fixture(autouse=True, scope="session")
def heard_signals() -> None:
    """Restore the signals that nohup or a background shell ignores, since stages would ignore these signals too."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed each test, so that its random numbers don't depend on the tests that ran before."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def small_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write one pixel instead of each figure in the slowest folders. Plotting takes a third of a stage's time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    draw = FigureCanvasAgg.print_png

    def pixel(canvas: FigureCanvasAgg, file: Path) -> None:
        if str(file).startswith(os.environ["ASSEMBLE_TESTS"]):  # other folders' tests check these figures
            draw(canvas, file)
        else:
            Image.new("RGB", (1, 1)).save(file, "PNG")

    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in SLOWEST:
            patch.setattr(FigureCanvasAgg, "print_png", pixel)
        yield


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Clear decoded media after each file and the helpers' caches after each folder. No later test uses either."""
    if nextitem is not None and nextitem.path == item.path:
        return
    FileCache._shared = None
    folder = f"tests.{item.path.parent.name}."
    if nextitem is None or nextitem.path.parent != item.path.parent:
        for module in [module for name, module in sys.modules.items() if name.startswith(folder)]:
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == module.__name__:
                    value.cache_clear()
    gc.collect()
