"""No training step waits for its device, and none does more operations for a larger batch.

Found without a device, on tensors of the device `meta`: they have no values, so whatever asks for one is noticed.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from assemble.stages.configuration import resolve
from assemble.stages.synthetic import NOWHERE, StopAfter, synthetic_training
from common.memory.collective import share_of_mean
from common.training.callbacks import StepSeed, StopOnNonFiniteLoss
from common.training.examples import Draw

ROOT = Path(__file__).parents[2]
META = torch.device("meta")
#: Operations whose result, or its shape, depends on values.
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "unique2")


@dataclass
class Steps:
    """What was seen of the steps after the first, in which some things are looked at once.

    Attributes:
        waits: what made the host wait, with the lines of our code that asked for it.
        operations: number of operations on the device, step by step.
        over: the last step is done.
    """

    waits: list[str] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)
    over: bool = False

    def note(self, what: str) -> None:
        if self.operations and not self.over:
            self.waits.append(f"{what} at {_place()}")


def _place() -> str:
    """The innermost line that belongs to the suite, and the one that called it."""
    own = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and ".venv" not in f.filename]
    own = [f for f in own if Path(f.filename) != Path(__file__)]
    return " < ".join(f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in reversed(own[-2:])) or "a library"


class _Operations(TorchDispatchMode):
    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_device = any(value.device == META for value in tensors)
        name = func.overloadpacket.__name__
        if on_device and self.steps.operations and not self.steps.over:
            self.steps.operations[-1] += 1
        indices = args[1] if name in ("index", "index_put", "index_put_") and on_device else ()
        if any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
            self.steps.note(f"{name} by a mask")
        elif on_device and name in READS:
            self.steps.note(name)
            if name == "_local_scalar_dense":
                return torch.ones((), dtype=args[0].dtype).item()  # some value, to go on
        elif name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else kwargs.get("device", source.device)
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if (source.device.type, torch.device(target).type) == ("meta", "cpu"):
                self.steps.note("copy to the host")
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            elif source.device.type == "cpu" and torch.device(target).type == "meta" and blocking:
                self.steps.note("copy from the host that blocks")
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if made and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.steps.note("tensor made of numbers of the host")
        return func(*args, **kwargs)


class _Meta(SingleDeviceStrategy):
    def __init__(self) -> None:
        super().__init__(device=META)

    def setup_environment(self) -> None:
        """No accelerator is asked about it."""

    def teardown(self) -> None:
        """Nothing comes back from there."""


class _Watch(pl.Callback):
    def __init__(self, steps: Steps, batches: int) -> None:
        self.steps = steps
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:  # a first step makes what later ones have
            self.steps.operations.append(0)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.over = batch_idx + 1 == self.batches


@contextlib.contextmanager
def _no_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else real(device_type, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", autocast)
        yield


def training_on_meta(
    paper: str, recipe: str, size: int, monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, steps: int = 2
) -> Steps:
    """Some steps of a recipe at the smoke scale, with the callbacks that every run has."""
    seen = Steps()
    run = resolve(paper, recipe, scale="smoke", arguments=overrides)
    callbacks = [StepSeed(), StopOnNonFiniteLoss(str(folder)), _Watch(seen, steps), StopAfter(steps)]
    training = synthetic_training(run, {"strategy": _Meta(), "callbacks": callbacks}, Draw(), size)
    with _no_autocast_on_meta(monkeypatch), _Made(seen), _Operations(seen):
        training.run()
    return seen


# A tokenizer with a file is stood in for, which saves making the miniature's vocabulary.
CASES = {
    "avid_cma/cma": (),
    "mct/mct_tag": (),
    "xmc_gan/xmc_gan": (),
    "m3p/m3p": (),
    "vx2text/avsd": ("--data.tokenizer.pretrained", NOWHERE),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_the_device_for_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper, recipe = case.split("/")
    small, large = (training_on_meta(paper, recipe, size, monkeypatch, tmp_path, *CASES[case]) for size in (2, 4))
    assert not small.waits + large.waits
    assert small.operations
    assert large.operations == small.operations, "a loop over the samples of a batch"


def test_a_share_of_several_devices_is_computed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.memory.collective.is_distributed", lambda: True)
    monkeypatch.setattr("common.memory.collective.mean_over_ranks", lambda count: count)
    steps = Steps(operations=[0])
    with _Made(steps), _Operations(steps):
        assert share_of_mean(3, META).device == META  # type: ignore[union-attr]
    assert not steps.waits


def test_the_guard_sees_what_waits() -> None:
    steps = Steps(operations=[0])
    values = torch.zeros(4, device="meta")
    with _Made(steps), _Operations(steps):
        assert float(values.sum()) == 1.0  # some value
        values.cpu()
        values.copy_(torch.zeros(4))
        values.copy_(torch.zeros(4), non_blocking=True)
        torch.tensor([1.0, 2.0], device="meta")
        torch.as_tensor(values, device="meta")
        with pytest.raises(NotImplementedError):
            values.nonzero()
        with pytest.raises(NotImplementedError):
            values[values > 0]
    kinds = [wait.split(" at ")[0] for wait in steps.waits]
    assert kinds[0] == "_local_scalar_dense"
    assert "copy to the host" in kinds
    assert kinds.count("copy from the host that blocks") == 1
    assert kinds.count("tensor made of numbers of the host") == 1
    assert "nonzero" in kinds
    assert "index by a mask" in kinds or kinds.count("nonzero") == 2
