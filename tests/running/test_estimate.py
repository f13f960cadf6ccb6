"""Estimates without storage against the same steps on real tensors, and what is made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from torch.profiler import ProfilerActivity, profile

from common.commands.main import main
from common.errors import StageError
from common.reporting.papers import paper_named
from common.stages import estimate as estimates
from common.stages.configuration import resolve
from common.stages.estimate import CARDS, Estimate, estimate
from common.stages.meters import operation_counter
from common.stages.synthetic import StopAfter, synthetic_training
from common.training.examples import Draw
from papers.m3p.selection import Best

FOUND = Estimate(
    parameters=300_000_000,
    trained=290_000_000,
    state_bytes=1_200_000_000,
    optimizer_bytes=2_320_000_000,
    reduction_bytes=1_160_000_000,
    peak_bytes=40_000_000_000,
    convolution_flops=30 * 10**12,
    other_flops=10 * 10**12,
    steps=1000,
    size=8,
    accumulated=1,
    devices=8,
    precision="bf16-mixed",
    checkpoint_bytes=3_520_000_000,
    kept_bytes=0,
)


class _Profiled(pl.Callback):
    """Profiles the memory of the last batch, and counts its operations."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.peak = 0
        self.flops = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last:
            self._counter = operation_counter()
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()
            self._counter.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.last:
            return
        self._counter.__exit__(None, None, None)
        self._profiler.__exit__(None, None, None)
        self.flops = self._counter.get_total_flops()
        now = 0
        events = self._profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        allocations = [event for event in events if event.name() == "[memory]"]
        assert allocations
        for event in sorted(allocations, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.peak = max(self.peak, now)


@pytest.mark.parametrize(
    ("paper", "recipe", "overrides"),
    [
        ("avid_cma", "avid", ("--model.video_encoder.width", "8", "--model.audio_encoder.width", "8")),
        (
            "m3p",
            "fine_tune",
            (
                "--model.model.encoder.width",
                "64",
                "--model.model.encoder.feed_forward_width",
                "256",
                "--model.updates",
                "per_cycle",
                "--model.accumulate",
                "1",
            ),
        ),
    ],
)
def test_memory_and_arithmetic_are_those_of_a_real_step(paper: str, recipe: str, overrides: tuple[str, ...]) -> None:
    run = resolve(paper, recipe, scale="smoke", arguments=overrides)
    found = estimate(run, size=8)
    watched = _Profiled(last=2)
    # Dropout keeps the CPU from fused attention, which a GPU has with it.
    training = synthetic_training(run, {"accelerator": "cpu", "callbacks": [watched, StopAfter(3)]}, Draw(), 8)
    for module in training.module.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    training.run()
    module, optimizers = training.module, training.trainer.optimizers
    assert found.parameters == sum(p.numel() for p in module.parameters())
    state = [*module.parameters(), *module.buffers(), *estimates._tensors([o.state_dict() for o in optimizers])]
    batch = estimates._bytes(estimates._tensors(training.data.synthetic.batch))
    assert found.flops == watched.flops
    # What the step itself takes; the batch was there before.
    real = watched.peak
    expected = found.peak_bytes - estimates._bytes(state) - batch
    print(f"{paper}: {expected / 1e6:.2f} MB estimated, {real / 1e6:.2f} MB by torch's allocator")
    assert expected == pytest.approx(real, rel=0.05)


def test_a_machine_with_a_gpu_estimates_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve("mct", "mct", scale="smoke", hardware="cpu")
    expected = estimate(run)
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: 1))
    assert estimate(run) == expected


def test_a_larger_batch_needs_more_of_the_same_state() -> None:
    run = resolve("mct", "moco_v2", scale="smoke")
    small, large = estimate(run, size=4), estimate(run, size=8)
    assert small.parameters == large.parameters
    assert small.optimizer_bytes == large.optimizer_bytes == 4 * small.trained  # momentum
    assert small.state_bytes == large.state_bytes
    assert large.peak_bytes > small.peak_bytes
    assert 1.9 < large.flops / small.flops < 2.1


def test_several_devices_share_the_batch_and_exchange_gradients() -> None:
    one = resolve("mct", "moco_v2", scale="smoke", arguments=("--data.batch_size", "8"))
    two = resolve("mct", "moco_v2", scale="smoke", arguments=("--data.batch_size", "8", "--trainer.devices", "2"))
    alone, together = estimate(one), estimate(two)
    assert (alone.size, together.size) == (8, 4)
    assert (alone.reduction_bytes, together.reduction_bytes) == (0, 4 * together.trained)
    odd = resolve("mct", "moco_v2", scale="smoke", arguments=("--data.batch_size", "9", "--trainer.devices", "2"))
    with pytest.raises(StageError, match="divisible by 2"):
        estimate(odd)


def test_hours_follow_from_the_card_and_the_precision() -> None:
    card = CARDS["a100"]
    seconds = 40e12 / 312e12 / 0.5
    assert FOUND.hours(card, 0.5) == pytest.approx(seconds * 1000 * 8 / 3600)
    full = replace(FOUND, precision="32-true")
    seconds = 30e12 / 156e12 + 10e12 / 19.5e12
    assert full.hours(card, 1.0) == pytest.approx(seconds * 1000 * 8 / 3600)
    assert replace(FOUND, steps=None).hours(card, 0.5) is None


def test_too_little_memory_is_said() -> None:
    assert estimates.warning(FOUND, None) is None
    assert estimates.warning(FOUND, 80 * 10**9) is None
    assert "41.1 GB on each device, which has 24.0 GB" in str(estimates.warning(FOUND, 24 * 10**9))
    assert "300 M parameters" in estimates.describe(FOUND)


def test_steps_are_whole_epochs_of_the_published_size() -> None:
    published = paper_named("mct").name
    run = resolve(published, "mct", scale="paper", hardware="gpu8")
    assert estimates._steps(run, 118_287 // 256, 1) == 200 * 462
    limited = resolve(published, "mct", scale="paper", arguments=("--trainer.limit_train_batches", "10"))
    assert estimates._steps(limited, 462, 1) == 2000
    assert estimates._steps(limited, 462, 4) == 600
    assert estimates._steps(run, None, 1) is None


def test_steps_of_a_recipe_that_counts_them_are_counted_as_it_does() -> None:
    """Two groups of losses make two updates in the first of two batches: an update for each batch, on average."""
    published = resolve("m3p", "m3p", scale="paper")
    assert estimates._steps(published, 833, 0.8) == published.config["trainer"]["max_steps"]
    by_group, by_cycle = (
        estimate(resolve("m3p", "fine_tune", scale="smoke", arguments=("--model.updates", updates)), size=4)
        for updates in ("per_group", "per_cycle")
    )
    assert (by_group.accumulated, by_cycle.accumulated) == (1.0, 2)
    assert by_cycle.flops == 2 * by_group.flops


@pytest.mark.parametrize(
    ("paper", "recipe", "overrides"),
    [
        ("mct", "moco_v2", ("--model.image_encoder.channels", "[32, 32, 64, 64]")),
        (
            "m3p",
            "fine_tune",
            ("--model.model.encoder.width", "64", "--model.model.encoder.feed_forward_width", "256",
             "--model.selection", "best", "--model.updates", "per_cycle"),
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_is_as_large_as_estimated(
    paper: str, recipe: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """M3P's holds, beside the optimizer's state, gradients that wait for an update and the best weights so far."""
    run = resolve(paper, recipe, scale="smoke", arguments=overrides)
    found = estimate(run, size=4)
    training = synthetic_training(run, {"accelerator": "cpu", "callbacks": [StopAfter(2)]}, Draw(), 4)
    training.run()
    if paper == "m3p":
        training.module.best = Best(1)
        training.module.best.weights = {k: v.clone() for k, v in training.module.model.state_dict().items()}
        for parameter in training.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
    path = tmp_path / "last.ckpt"
    training.trainer.save_checkpoint(path)
    print(f"{paper}: {found.checkpoint_bytes / 1e6:.3f} MB estimated, {path.stat().st_size / 1e6:.3f} MB written")
    assert path.stat().st_size == pytest.approx(found.checkpoint_bytes, rel=0.08)


@pytest.mark.parametrize(("recipe", "clips", "mined"), [("cma_audioset", 1_784_108, 32), ("ablation_cma", 99_999, 128)])
def test_banks_of_the_whole_set_are_counted(recipe: str, clips: int, mined: int) -> None:
    """Two banks of 128 numbers a clip and its positives, in memory and in a checkpoint; on lists, those of the list."""
    narrow = ["--model.video_encoder.width", "4", "--model.audio_encoder.width", "4"]
    found = estimate(resolve("avid_cma", recipe, scale="paper", arguments=narrow), size=2)
    banks = clips * (2 * 128 + mined) * 4
    assert banks < found.state_bytes - 4 * found.parameters < banks + 100_000
    assert found.peak_bytes > found.state_bytes
    assert found.checkpoint_bytes > found.state_bytes
    assert found.steps == {"cma_audioset": 40 * 3484, "ablation_cma": 75 * 1785}[recipe]


def test_kept_checkpoints_are_counted() -> None:
    main_model = resolve("xmc_gan", "xmc_gan_main", scale="paper")
    assert estimates._kept(main_model, 161_000, 10, 30) == 32 * 10  # weights alone, every 5,000 steps
    assert estimates._kept(main_model, None, 10, 30) is None
    assert estimates._kept(resolve("mct", "mct", scale="paper"), 92_400, 10, 30) == 0
    assert estimates._kept(resolve("avid_cma", "ablation_cross", scale="paper"), None, 10, 30) == 4 * 30
    assert replace(FOUND, kept_bytes=2 * 10**9).disk_bytes == 5_520_000_000
    assert "3.5 GB of checkpoints" in estimates.describe(FOUND)


def test_the_plan_shows_an_estimate_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["plan", "mct", "--scale", "smoke", "--stages", "moco_v2", "--estimate", "--card", "a100"]
    command += ["--runs", str(tmp_path), "--data", str(tmp_path)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "moco_v2 seed 0" in first
    assert "h A100 80 GB" in first.splitlines()[0]
    assert " disk " in first.splitlines()[0]
    assert "at most while one is replaced" in first
    # The second time it is read.
    monkeypatch.setattr(estimates, "estimate", lambda *_: pytest.fail("estimated again"))
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert main([*command, "--utilization", "3"]) == 2
    assert main([*command[:-4], "--card", "a1000"]) == 2


def test_a_stage_that_cannot_be_estimated_says_why() -> None:
    with pytest.raises(StageError, match="trains nothing"):
        estimate(resolve("avid_cma", "esc50_svm", scale="smoke"))
    run = resolve("mct", "moco_v2", scale="smoke")
    broken = replace(run, paper="mct", recipe="moco_v2", config={**run.config, "data": {"class_path": "nothing"}})
    assert "no estimate" in estimates.announce(broken)[0]


def test_random_numbers_are_left_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    estimate(resolve("mct", "moco_v2", scale="smoke"), size=4)
    assert torch.equal(before, torch.get_rng_state())
