"""Set-up shared by all tests."""

# ruff: noqa: E402

from __future__ import annotations

import os

# Before anything reads them: no test logs to W&B that does not ask for it, writes into the user's cache or starts more
# threads than one.
for name in [one for one in os.environ if one.startswith(("ASSEMBLE_", "WANDB_", "SLURM_", "FORCE_COLOR", "NO_COLOR"))]:
    if name != "ASSEMBLE_TESTS_HAVE":  # settings of whoever runs the tests
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
import torch._dynamo  # imported before workers are forked: importing it in a forked child can hang
from hypothesis import HealthCheck, Phase, settings
from PIL import Image

from common.data.media import FileCache

#: Folders whose files take longest: they go first, so that no process is left alone with one at the end.
SLOWEST = ("resume", "running", "distributed", "faults", "cli", "training")

#: These start autograd's threads, after which a forked process cannot train.
LAST = ("test_estimate.py", "test_gpu_check.py")

# One thread: results do not depend on the machine's core count, and forked workers inherit no thread pool.
torch.set_num_threads(1)

# Every run tries the same examples, however slow the machine is.
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
# Of `make mutation`: what fails is not made smaller.
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (item.path.name in LAST, item.path.parent.name not in SLOWEST))


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it took half a second whenever a stage or a file of tests ended."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Files that can be made again go to a temporary folder of this run, never to the user's cache.

    The workers of a run share it: what one has rendered or trained the others find.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ.update(ASSEMBLE_CACHE=str(base / "cache"), ASSEMBLE_TESTS=str(base / "trained"))
    Path(os.environ["ASSEMBLE_CACHE"]).mkdir(exist_ok=True)


@pytest.fixture(autouse=True, scope="session")
def heard_signals() -> None:
    """What nohup or a shell in the background ignores, a stage would ignore, too."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same numbers whichever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def small_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """A pixel in place of each figure of a stage that is run for something else: drawing takes a third of its time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    draw = FigureCanvasAgg.print_png

    def pixel(canvas: FigureCanvasAgg, file: Path) -> None:
        if str(file).startswith(os.environ["ASSEMBLE_TESTS"]):  # a stage that other folders look at, too
            draw(canvas, file)
        else:
            Image.new("RGB", (1, 1)).save(file, "PNG")

    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in SLOWEST:
            patch.setattr(FigureCanvasAgg, "print_png", pixel)
        yield


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a file drop what was decoded, and after a folder what its helpers keep: nobody else reads it."""
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
