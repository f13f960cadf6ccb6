"""Estimates memory, operations, steps and GPU hours of a stage from one training batch of fake tensors (no storage).

- memory: peak memory of all tensors in a step after the first, without library workspaces and fragmentation.
- loaders: batches that the loader processes of a node prepare (`loader_plan`).
- operations: matrix products, convolutions and attention, forward and backward, by torch's FlopCounterMode.
- steps: from the published sizes of the data sets.
- hours: operations divided by a card's rate and an assumed utilization.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from assemble.reporting.records import IGNORED_KEYS, SEED_KEYS, config_hash
from assemble.stages import fake_step
from assemble.stages.configuration import RunConfiguration
from assemble.stages.synthetic import (
    StopAfter,
    SyntheticTraining,
    built_without_files,
    devices_of,
    quiet,
    synthetic_training,
)
from common.errors import StageError
from common.training.data_module import bytes_of, loader_plan
from common.training.examples import RandomTensors
from common.types import class_at

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: dense matrix rates in 10^12 operations per second."""

    name: str
    bfloat16: float
    tensor_float32: float
    float32: float


#: From the vendors' data sheets; rates without sparsity, at boost clock.
CARDS = (
    Card("RTX 4090", 165.2, 82.6, 82.6),
    Card("A100 80 GB", 312.0, 156.0, 19.5),
    Card("H100 SXM", 989.0, 495.0, 67.0),
)
#: Memory of CUDA and its libraries on each device.
CONTEXT_BYTES = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """The estimated needs of a stage.

    Attributes:
        peak_bytes: peak memory of all tensors on one device.
        checkpoint_bytes: weights and the state of the optimizers.
        convolution_flops, other_flops: operations of an optimizer step on one device. A multiply-add counts as two.
        steps: optimizer steps of the whole training; None if the size of the data is not published.
        size: samples of a batch on one device.
        loader_bytes: peak memory of the batches that the loaders of a node prepare.
        accumulated: batches per optimizer step; below 1 if there are several steps per batch.
    """

    parameters: int
    peak_bytes: int
    convolution_flops: int
    other_flops: int
    steps: int | None
    precision: str
    checkpoint_bytes: int = 0
    size: int = 1
    accumulated: float = 1
    devices: int = 1
    loader_bytes: int = 0

    @property
    def flops(self) -> int:
        return self.convolution_flops + self.other_flops

    @property
    def memory(self) -> int:
        """Bytes per device, including the CUDA context."""
        return self.peak_bytes + CONTEXT_BYTES

    def seconds(self, card: Card, utilization: float) -> float:
        if self.precision.startswith(("bf16", "16")):
            seconds = self.flops / (card.bfloat16 * 1e12)
        else:
            # By default, torch uses TF32 for convolutions and float32 for matrix products.
            seconds = self.convolution_flops / (card.tensor_float32 * 1e12) + self.other_flops / (card.float32 * 1e12)
        return seconds / utilization

    def hours(self, card: Card, utilization: float) -> float | None:
        return None if self.steps is None else self.seconds(card, utilization) * self.steps * self.devices / 3600

    def samples_per_second(self, card: Card, utilization: float) -> float:
        return self.size * self.accumulated * self.devices / self.seconds(card, utilization)


def one_core() -> Card:
    """Measure the matrix rate of one core of this processor with a product of two float32 matrices."""
    matrix, rate = torch.rand(1024, 1024), 0.0
    for _ in range(5):
        began = time.process_time()
        matrix @ matrix
        rate = max(rate, 2 * 1024**3 / max(time.process_time() - began, 1e-6) / 1e12)
    return Card("one core", rate, rate, rate)


def estimate_test(run: RunConfiguration) -> Estimate:
    """Estimate a stage that only runs a frozen encoder. Don't count what is fit on the features, such as an SVM."""
    if not hasattr(class_at(run.config["data"]["class_path"]), "test_example"):
        raise StageError(f"{run.recipe} does not train")
    mode, meter, counter = FakeTensorMode(), fake_step.MemoryMeter(), fake_step.operation_counter()
    cli = built_without_files(run, mode)
    example = cli.datamodule.test_example(RandomTensors(empty=True))
    with mode, torch.no_grad(), meter, counter:
        meter.add([*cli.model.parameters(), *cli.model.buffers()])
        cli.model.eval()(mode.from_tensor(example.batch))
    convolution, products = _operations(counter)
    return Estimate(
        parameters=sum(p.numel() for p in cli.model.parameters()),
        peak_bytes=meter.peak,
        convolution_flops=convolution,
        other_flops=products,
        steps=example.batches,
        precision=str(run.config["trainer"]["precision"]),
    )


def estimate(run: RunConfiguration, size: int | None = None) -> Estimate:
    """Estimate a stage. `size` is the samples per device; None takes the device's share of the recipe's batch."""
    if not run.trains:
        return estimate_test(run)
    training, meter, counter = fake_training(run, size)
    module = training.module
    stored = fake_step.MemoryMeter()
    stored.add([module.state_dict(), *(optimizer.state_dict() for optimizer in training.trainer.optimizers)])
    # Under manual optimization this is only known after a batch.
    accumulated = getattr(module, "batches_per_update", run.config["trainer"].get("accumulate_grad_batches", 1))
    devices = devices_of(run)
    gradients = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    # Several devices exchange a copy of the gradients. Accumulated gradients stay during the next forward pass.
    copies = (devices > 1) + (accumulated != 1)
    convolution, products = _operations(counter)
    data, loader_bytes = training.data, 0
    if data.num_workers:
        per_node = devices // int(run.config["trainer"].get("num_nodes", 1))
        sample = bytes_of(data.synthetic.batch) // training.size
        budget = data.in_flight_bytes // per_node
        loader_bytes = per_node * loader_plan(budget, sample, training.size, data.num_workers).held
    return Estimate(
        parameters=sum(p.numel() for p in module.parameters()),
        peak_bytes=meter.peak + copies * gradients,
        checkpoint_bytes=stored.now,
        convolution_flops=round(convolution * accumulated),
        other_flops=round(products * accumulated),
        steps=_steps(run, training.data.synthetic.batches, accumulated),
        size=training.size,
        accumulated=accumulated,
        devices=devices,
        precision=str(run.config["trainer"]["precision"]),
        loader_bytes=loader_bytes,
    )


def fake_training(
    run: RunConfiguration,
    size: int | None = None,
    device: torch.device = CPU,
    watch: AbstractContextManager[Any] | None = None,
    callbacks: Sequence[pl.Callback] = (StopAfter(1),),
) -> tuple[SyntheticTraining, fake_step.MemoryMeter, FlopCounterMode]:
    """Train on fake tensors (no storage), as on CUDA. `watch` is active during the training."""
    mode = FakeTensorMode(allow_non_fake_inputs=device == CPU)
    meter, counter = fake_step.MemoryMeter(), fake_step.operation_counter()
    arguments = {
        "accelerator": "cpu",  # else Lightning picks a GPU and refuses the strategy
        "strategy": fake_step.FakeDevice(device),
        "callbacks": [fake_step.WithoutStorage(), *callbacks],
        "accumulate_grad_batches": 1,
    }
    with quiet(), fake_step.deep_copies_without_storage():
        training = synthetic_training(run, arguments, RandomTensors(empty=True), size, build_in=(mode,))
        if isinstance(precision := training.trainer.precision_plugin, MixedPrecision):
            precision.device = device.type
        with mode:
            fake_step.place(training.module, device)
        meter.add([*training.module.parameters(), *training.module.buffers()])
        with fake_step.memory_of_cuda(), fake_step.fused_attention(), mode, watch or nullcontext(), meter, counter:
            try:
                training.run()
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise StageError(f"{run.recipe}: training steps depend on values of tensors ({error.func})") from error
    return training, meter, counter


def _operations(counter: FlopCounterMode) -> tuple[int, int]:
    """Return the counted operations of convolutions, then those of everything else."""
    counts = counter.get_flop_counts().get("Global", {})
    convolution = sum(count for kind, count in counts.items() if "conv" in str(kind))
    return convolution, sum(counts.values()) - convolution


def _steps(run: RunConfiguration, batches: int | None, accumulated: float) -> int | None:
    trainer = run.config["trainer"]
    most, epochs = int(trainer.get("max_steps", -1)), int(trainer.get("max_epochs") or -1)
    limit = trainer.get("limit_train_batches")
    if isinstance(limit, int) and batches is not None:
        batches = min(batches, limit)
    if batches is None or epochs < 0:
        return most if most > 0 else None
    steps = epochs * math.ceil(batches / accumulated)
    return min(steps, most) if most > 0 else steps


# -- showing -----------------------------------------------------------------------------------------------------------


def size_text(count: float) -> str:
    """Write bytes as `512 MB` or `31.4 GB`, in powers of 1000."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def hours_text(hours: float | None) -> str:
    """Write hours as `0.4`, `12` or `1,530`, and None as a dash."""
    if hours is None:
        return "-"
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def _estimates(runs: Mapping[str, RunConfiguration]) -> Iterator[tuple[str, Estimate | StageError]]:
    """Yield every stage's estimate, or the error that prevents one. Estimate stages of equal configuration once."""
    estimates: dict[str, Estimate | StageError] = {}
    for name, run in runs.items():
        key = config_hash(run.config, IGNORED_KEYS | SEED_KEYS) + str(devices_of(run))
        if key not in estimates:
            try:
                estimates[key] = estimate(run)
            except StageError as error:
                estimates[key] = error
        yield name, estimates[key]


#: The table says that a CPU can run a stage if it takes at most this many hours on one core.
CPU_HOURS = 24


def cheapest_first(
    runs: Mapping[str, RunConfiguration], utilization: float, verdicts: Mapping[str, str]
) -> Iterator[str]:
    """Yield a table of stages, cheapest first: hours, whether a CPU can run them, memory and verdict."""
    card, core = CARDS[1], one_core()
    costs: dict[str, list[float | None]] = {}
    for name, needs in _estimates(runs):
        if isinstance(needs, StageError):
            costs[name] = [None, None, None]
        else:
            costs[name] = [needs.hours(card, utilization), needs.hours(core, utilization), needs.memory]
    width = max(map(len, runs), default=0)
    yield f"{'stage'.ljust(width)}  {f'h {card.name}'.rjust(12)}  {f'h {core.name}'.rjust(12)}  CPU  {'memory':>8}  go?"
    for name, (*hours, memory) in sorted(
        costs.items(), key=lambda item: math.inf if item[1][0] is None else item[1][0]
    ):
        able = "-" if hours[1] is None else "yes" if hours[1] <= CPU_HOURS else "no"
        size = "-" if memory is None else size_text(memory)
        times = "  ".join(hours_text(value).rjust(12) for value in hours)
        yield f"{name.ljust(width)}  {times}  {able:3}  {size:>8}  {verdicts[name]}"
    yield (
        f"estimates at {utilization:.0%} of the peak matrix rate of the card or one core here, without fitting SVMs; "
        f"CPU: up to {CPU_HOURS} h on one core; a dash: unknown; see docs/gpu.md"
    )


def estimate_lines(runs: Mapping[str, RunConfiguration], utilization: float) -> Iterator[str]:
    """Yield a table of a plan's stages. `utilization` is the assumed fraction of a card's matrix rate."""
    width = max(map(len, runs), default=0)

    def line(name: str, values: Iterable[str]) -> str:
        return "  ".join([name.ljust(width), *(value.rjust(12) for value in values)])

    heads = (
        "batch/GPU", "GPUs", "parameters", "memory/GPU", "checkpoint", "loaders/node", "TFLOP/step", "steps",
        "samples/s",
    )  # fmt: skip
    yield line("stage", [*heads, *(f"h {card.name}" for card in CARDS)])
    totals = dict.fromkeys(CARDS, 0.0)
    for name, needs in _estimates(runs):
        if isinstance(needs, StageError):
            yield f"{name.ljust(width)}  {needs}"
            continue
        hours = {card: needs.hours(card, utilization) for card in CARDS}
        for card, value in hours.items():
            totals[card] += value or 0.0
        batches = f" x {needs.accumulated:g}" if needs.accumulated > 1 else ""
        values = [
            f"{needs.size}{batches}", str(needs.devices), f"{needs.parameters / 1e6:.1f} M", size_text(needs.memory),
            size_text(needs.checkpoint_bytes), size_text(needs.loader_bytes), f"{needs.flops / 1e12:.3g}",
            "-" if needs.steps is None else f"{needs.steps:,}",
            f"{needs.samples_per_second(CARDS[-1], utilization):,.0f}" if needs.flops else "-",
        ]  # fmt: skip
        yield line(name, [*values, *map(hours_text, hours.values())])
    yield line("all", [*[""] * len(heads), *map(hours_text, totals.values())])
    yield (
        f"estimates at {utilization:.0%} of a card's peak matrix rate: GPU hours of training (h), and samples per "
        f"second over all devices on {CARDS[-1].name}; see docs/gpu.md"
    )
