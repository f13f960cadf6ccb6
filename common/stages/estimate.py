"""What a stage will need: parameters, memory of each device, arithmetic of a step, number of steps, hours, disk.

One batch of the stage's own training runs on tensors without storage (torch's FakeTensorMode), so that it takes
seconds, no GPU and hardly any memory. What is counted:

- memory: every tensor that is alive at once, of a step like any after the first, as PyTorch frees them. Not counted
  are the CUDA context and the workspaces of libraries, about a gigabyte, nor what the allocator cannot use.
- arithmetic: multiplications of matrices, convolutions and attention, forward and backward, by torch's FlopCounterMode.
- steps: from the published sizes of the data sets.
- disk: checkpoints, the one to go on from and those that a recipe keeps. Not counted are pictures, curves and logs of a
  run, and what lies in the cache folder.

Hours are arithmetic by the rate of a card by a utilization that is given, not measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import StageError, nearest
from common.files import cache_folder, write_atomically
from common.reporting.papers import project_root
from common.reporting.records import IGNORED_KEYS, SEED_KEYS, config_hash
from common.stages.configuration import RunConfiguration
from common.stages.lean import import_lightning
from common.stages.reading import kept_reading, reads_as, wanted


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: memory in 10^9 bytes, and dense matrix rates in 10^12 operations per second."""

    name: str
    memory: float
    bfloat16: float
    tensor_float32: float
    float32: float


#: Data sheets of the makers; rates without sparsity, at the highest clock.
CARDS = {
    "v100": Card("V100 32 GB", 34.4, 125.0, 15.7, 15.7),  # half precision in the place of bfloat16
    "rtx4090": Card("RTX 4090", 25.8, 165.2, 82.6, 82.6),
    "a100": Card("A100 80 GB", 85.9, 312.0, 156.0, 19.5),
    "h100": Card("H100 SXM", 85.9, 989.0, 495.0, 67.0),
    "h200": Card("H200 SXM", 151.4, 989.0, 495.0, 67.0),
}
#: Share of a card's rate that a training is taken to reach: from hard to feed to well fed.
UTILIZATION = (0.2, 0.4)
#: What CUDA and its libraries take beside tensors, in bytes.
CONTEXT_BYTES = 1 << 30
_CACHE_VERSION = 2


@dataclass(frozen=True)
class Estimate:
    """What a stage needs.

    Attributes:
        parameters, trained: number of parameters, and of those that learn.
        state_bytes: parameters and buffers of one device, memory banks and queues among them.
        optimizer_bytes: state of the optimizers.
        reduction_bytes: copies of the gradients that several devices exchange; 0 with one.
        peak_bytes: most memory of all tensors at once, `reduction_bytes` among it.
        convolution_flops, other_flops: operations of an optimizer step on one device, two for a multiplication with
            an addition.
        steps: optimizer steps of the whole training; None where the size of the data is not published.
        size: samples of a batch on one device.
        accumulated: batches of an optimizer step; below 1 where one batch makes several steps.
        devices: of the whole training.
        precision: of the trainer.
        checkpoint_bytes: of a checkpoint to go on from, with the state of the optimizers.
        kept_bytes: of all checkpoints that stay beside the last one; None where their number is not known.
    """

    parameters: int
    trained: int
    state_bytes: int
    optimizer_bytes: int
    reduction_bytes: int
    peak_bytes: int
    convolution_flops: int
    other_flops: int
    steps: int | None
    size: int
    accumulated: float
    devices: int
    precision: str
    checkpoint_bytes: int
    kept_bytes: int | None

    @property
    def disk_bytes(self) -> int | None:
        """Checkpoints of a finished stage; None where their number is not known."""
        return None if self.kept_bytes is None else self.checkpoint_bytes + self.kept_bytes

    @property
    def flops(self) -> int:
        """Operations of an optimizer step on one device."""
        return self.convolution_flops + self.other_flops

    def seconds(self, card: Card, utilization: float) -> float:
        """Seconds of an optimizer step."""
        if self.precision.startswith(("bf16", "16")):
            seconds = self.flops / (card.bfloat16 * 1e12)
        else:
            # torch lets convolutions take TF32 and keeps products of matrices in float32.
            seconds = self.convolution_flops / (card.tensor_float32 * 1e12) + self.other_flops / (card.float32 * 1e12)
        return seconds / utilization

    def hours(self, card: Card, utilization: float) -> float | None:
        """Hours of all devices together; None where the number of steps is not known."""
        return None if self.steps is None else self.seconds(card, utilization) * self.steps * self.devices / 3600

    def samples_per_second(self, card: Card, utilization: float) -> float:
        """Samples a second that all devices together take."""
        return self.size * self.accumulated * self.devices / self.seconds(card, utilization)


# -- estimating --------------------------------------------------------------------------------------------------------


def estimate(run: RunConfiguration, size: int | None = None) -> Estimate:
    """Estimate one stage that trains.

    Args:
        run: its configuration.
        size: samples of a batch on one device; None for its share of the recipe's batch.

    Raises:
        StageError: it does not train, its data cannot be made up, or its steps depend on values of tensors.
    """
    if not run.trains:
        raise StageError(f"{run.recipe} trains nothing")
    import_lightning()  # first: it sets the level of its loggers
    import torch
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    from common.stages import meters
    from common.stages.synthetic import StopAfter, devices_of, synthetic_training
    from common.training.examples import Draw

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    meter, counter = meters.MemoryMeter(), meters.operation_counter()
    arguments = {
        "accelerator": "cpu",  # else Lightning takes the machine's own, and refuses the device without storage
        "strategy": meters.FakeDevice(),
        "callbacks": [meters.WithoutStorage(mode, meter), StopAfter(1)],
        "accumulate_grad_batches": 1,
    }
    with _quiet(), torch.random.fork_rng(devices=[]):
        with meters.Unfilled():
            training = synthetic_training(run, arguments, Draw(empty=True), size)
        module, trainer = training.module, training.trainer
        meters.take_storage_away(module, mode, meter)
        with meters.deep_copies_without_storage(), meters.FusedAttention(), mode, meter, counter:
            try:
                training.run()
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise StageError(f"{run.recipe}: its steps depend on values of tensors ({error.func})") from error
            state = [tensor for optimizer in trainer.optimizers for tensor in _tensors(optimizer.state_dict())]
    # Of a module that decides itself when it updates, after the batch that has just been made.
    accumulated = getattr(module, "batches_per_update", run.config["trainer"].get("accumulate_grad_batches", 1))
    parameters = list(module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    devices = devices_of(run)
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    reduction = gradients if devices > 1 else 0
    # Gradients of earlier batches wait through the forward pass of a later one.
    waiting = gradients if accumulated != 1 else 0
    weights = _bytes(_tensors(module.state_dict()))
    # Some keep a second copy, such as the best weights so far.
    checkpoint = weights * getattr(module, "weights_in_checkpoint", 1) + _bytes(state) + waiting
    steps = _steps(run, training.data.synthetic.batches, accumulated)
    counts = counter.get_flop_counts().get("Global", {})
    convolution = sum(count for kind, count in counts.items() if "conv" in str(kind))
    return Estimate(
        parameters=sum(p.numel() for p in parameters),
        trained=trained,
        state_bytes=_bytes([*parameters, *module.buffers()]),
        optimizer_bytes=_bytes(state),
        reduction_bytes=reduction,
        peak_bytes=meter.peak + reduction + waiting,
        convolution_flops=round(convolution * accumulated),
        other_flops=round((sum(counts.values()) - convolution) * accumulated),
        steps=steps,
        size=training.size,
        accumulated=accumulated,
        devices=devices,
        precision=str(run.config["trainer"].get("precision", "32-true")),
        checkpoint_bytes=checkpoint,
        kept_bytes=_kept(run, steps, weights, checkpoint),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """While it lasts, Lightning says nothing of devices and seeds that are not those of a run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def _tensors(tree: Any) -> Iterable[Any]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if hasattr(leaf, "untyped_storage")]


def _bytes(tensors: Iterable[Any]) -> int:
    """Memory of some tensors, storages that several of them share counted once."""
    return sum({id(s := t.untyped_storage()): s.nbytes() for t in tensors}.values())


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


def _kept(run: RunConfiguration, steps: int | None, weights: int, whole: int) -> int | None:
    """Bytes of the checkpoints that callbacks keep beside the last one."""
    trainer, kept = run.config["trainer"], 0
    for callback in trainer.get("callbacks") or []:
        arguments = callback.get("init_args") or {}
        most = arguments.get("save_top_k", 1)
        if not str(callback["class_path"]).endswith(".ModelCheckpoint") or arguments.get("filename") == "last":
            continue
        if every := arguments.get("every_n_train_steps"):
            count = None if steps is None else steps // every
        else:
            epochs = int(trainer.get("max_epochs") or -1)
            count = None if epochs < 0 else epochs // (arguments.get("every_n_epochs") or 1)
        if count is None:
            return None
        kept += (count if most < 0 else min(most, count)) * (weights if arguments.get("save_weights_only") else whole)
    return kept


# -- kept estimates ----------------------------------------------------------------------------------------------------


def kept_estimate(run: RunConfiguration) -> Estimate:
    """`estimate`, or what an earlier call found for the same configuration and the same code.

    Raises:
        StageError: see `estimate`.
    """
    import torch

    from common.stages.synthetic import devices_of

    configured = config_hash(run.config, IGNORED_KEYS | SEED_KEYS)
    parts = [str(_CACHE_VERSION), torch.__version__, configured, str(devices_of(run)), _code_hash(run)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = cache_folder() / "estimates" / f"{run.paper}-{run.recipe}-{key}.json"
    try:
        return Estimate(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = estimate(run)
    with suppress(OSError):  # a cache that cannot be written costs seconds, no more
        write_atomically(path, json.dumps(asdict(found), indent=1, sort_keys=True) + "\n")
    return found


def _code_hash(run: RunConfiguration) -> str:
    state = hashlib.sha256()
    for folder in (project_root() / "papers" / run.paper, project_root() / "common"):
        for path in sorted(folder.rglob("*.py")):
            state.update(path.read_bytes())
    return state.hexdigest()


# -- showing -----------------------------------------------------------------------------------------------------------


def size_text(count: float) -> str:
    """`512 MB` or `31.4 GB`, in powers of 1000."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def hours_text(hours: float | None) -> str:
    """`0.4`, `12` or `1,530`; a dash for what is not known."""
    if hours is None:
        return "-"
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def disk_text(count: int | None) -> str:
    """As `size_text`; a dash for what is not known."""
    return "-" if count is None else size_text(count)


def describe(found: Estimate) -> str:
    """An estimate in one line."""
    low, high = UTILIZATION
    hours = "; ".join(
        f"{card.name} {hours_text(found.hours(card, high))} to {hours_text(found.hours(card, low))}"
        for card in (CARDS["a100"], CARDS["h100"])
    )
    steps = "an unknown number of" if found.steps is None else f"{found.steps:,}"
    return (
        f"{found.parameters / 1e6:.0f} M parameters, {size_text(found.peak_bytes + CONTEXT_BYTES)} on each of "
        f"{found.devices} devices with {found.size} samples, {found.flops / 1e12:.3g} TFLOP a step, {steps} steps, "
        f"{disk_text(found.disk_bytes)} of checkpoints; "
        f"GPU hours at {high:.0%} to {low:.0%} of a card's rate: {hours}"
    )


def warning(found: Estimate, memory: int | None) -> str | None:
    """What to say when a device has too little memory; None when it has enough or is not known.

    Args:
        found: the estimate.
        memory: of one device, in bytes.
    """
    needed = found.peak_bytes + CONTEXT_BYTES
    if memory is None or needed <= memory:
        return None
    return (
        f"needs about {size_text(needed)} on each device, which has {size_text(memory)}: take more devices, a smaller "
        "data.batch_size with trainer.accumulate_grad_batches, or trainer.precision bf16-mixed"
    )


def device_memory() -> int | None:
    """Memory of this machine's first GPU in bytes; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def announce(run: RunConfiguration) -> list[str]:
    """Lines to print before a stage starts: what it will need, and a warning where that is too much.

    Nothing where it trains nothing or cannot be estimated; an estimate must never stop a run.
    """
    if not run.trains:
        return []
    try:
        found = kept_estimate(run)
    except Exception as error:
        return [f"  no estimate: {str(error).splitlines()[0] if str(error) else type(error).__name__}"]
    memory = device_memory() if run.config["trainer"].get("accelerator") in {"gpu", "cuda", "auto"} else None
    too_much = warning(found, memory)
    return [f"  estimate: {describe(found)}", *([f"  WARNING: {too_much}"] if too_much else [])]


HEADS = ("batch/GPU", "GPUs", "parameters", "memory/GPU", "TFLOP/step", "steps", "disk")


def estimate_lines(runs: Mapping[str, RunConfiguration], cards: Sequence[Card], utilization: float) -> Iterator[str]:
    """A table of the stages of a plan, line by line as they are found; stages that are alike are estimated once.

    Args:
        runs: name of a stage to its configuration.
        cards: whose hours are shown.
        utilization: share of a card's rate that is taken to be reached.
    """
    width = max(map(len, runs), default=0)

    def line(name: str, values: Iterable[str]) -> str:
        return "  ".join([name.ljust(width), *(value.rjust(12) for value in values)])

    yield line("stage", [*HEADS, *(f"h {card.name}" for card in cards)])
    totals = dict.fromkeys(cards, 0.0)
    disk = largest = 0
    fastest: dict[str, tuple[RunConfiguration, Mapping[str, float]]] = {}
    for name, run in runs.items():
        try:
            found = kept_estimate(run)
        except StageError as error:
            yield f"{name.ljust(width)}  {error}"
            continue
        hours = {card: found.hours(card, utilization) for card in cards}
        for card, value in hours.items():
            totals[card] += value or 0.0
        disk += found.disk_bytes or 0
        largest = max(largest, found.checkpoint_bytes)
        pace = {card.name: found.samples_per_second(card, utilization) for card in cards if found.flops}
        before = fastest.get(reads_as(run))
        if pace and (before is None or max(pace.values()) > max(before[1].values())):
            fastest[reads_as(run)] = run, pace
        batches = f" x {found.accumulated:g}" if found.accumulated > 1 else ""
        values = [
            f"{found.size}{batches}", str(found.devices), f"{found.parameters / 1e6:.1f} M",
            size_text(found.peak_bytes + CONTEXT_BYTES), f"{found.flops / 1e12:.3g}",
            "-" if found.steps is None else f"{found.steps:,}", disk_text(found.disk_bytes),
        ]  # fmt: skip
        yield line(name, [*values, *map(hours_text, hours.values())])
    yield line("all", [*[""] * (len(HEADS) - 1), size_text(disk), *map(hours_text, totals.values())])
    yield (
        f"GPU hours of training alone, at {utilization:.0%} of a card's matrix rate; memory with 1.1 GB for CUDA; an "
        "estimate, not a measurement"
    )
    yield (
        f"disk: the last checkpoint and those that are kept; {size_text(largest)} more at most while one is replaced. "
        "Without data, caches, pictures and curves (docs/gpu.md)"
    )
    readings = {key: kept_reading(run) for key, (run, _) in fastest.items()}
    for key, (run, taken) in fastest.items():
        yield wanted(run, taken, readings[key])
    if None in readings.values():
        yield "what that takes of this machine: `assemble data PAPER --measure`, where the data are"


def chosen_cards(names: Sequence[str]) -> list[Card]:
    """Cards by name.

    Raises:
        StageError: there is none of a name.
    """
    for name in names:
        if name not in CARDS:
            raise StageError(f"--card {name}: {nearest(name, CARDS)}")
    return [CARDS[name] for name in names]
