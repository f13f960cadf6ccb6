"""Compare estimates on tensors without storage with the same steps on real tensors, and test the printed tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.profiler import ProfilerActivity, profile

from assemble.commands.main import main
from assemble.reporting.papers import existing_papers, paper_named
from assemble.stages import estimate as estimates
from assemble.stages.configuration import resolve
from assemble.stages.estimate import CARDS, Card, Estimate, estimate
from assemble.stages.fake_step import MemoryMeter, operation_counter
from assemble.stages.layers import leaves
from assemble.stages.plan import plan_stages
from assemble.stages.recipes import scales_of
from assemble.stages.request import Selection
from assemble.stages.synthetic import NOWHERE, StopAfter, synthetic_training, without_files
from common.errors import StageError
from common.training.examples import RandomTensors
from common.types import class_at

FOUND = Estimate(
    parameters=300_000_000,
    peak_bytes=40_000_000_000,
    checkpoint_bytes=3_520_000_000,
    convolution_flops=30 * 10**12,
    other_flops=10 * 10**12,
    steps=1000,
    size=8,
    accumulated=1,
    devices=8,
    precision="bf16-mixed",
    loader_bytes=16_000_000_000,
)


class _Profiled(pl.Callback):
    """Measure the memory of the last batch, and count its operations."""

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


@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_no_planned_model_reads_a_file(paper: str) -> None:
    hardware = {"paper": "gpu8", "single": "gpu1", "mini": "cpu", "smoke": "cpu"}
    for scale in scales_of(paper):
        for item in plan_stages(paper, Selection(scale=scale, hardware=hardware[scale])):
            if item.run.trains:
                fields = leaves(without_files(item.run)["model"])
                assert not [field for field, value in fields if NOWHERE in str(value)], (scale, item.run.recipe)
            elif not hasattr(class_at(item.run.config["data"]["class_path"]), "test_example"):
                with pytest.raises(StageError, match="does not train"):
                    estimate(item.run)


def test_recomputed_blocks_need_less_memory() -> None:
    plain, saving = (
        estimate(resolve("mct", "moco_v2", scale="mini", arguments=["--gradient_checkpointing", value]), size=16)
        for value in ("false", "true")
    )
    assert saving.peak_bytes < plain.peak_bytes
    assert saving.flops > plain.flops


@pytest.mark.parametrize(
    ("paper", "recipe", "overrides"),
    [
        ("avid_cma", "avid", "--model.video_encoder.width 8 --model.audio_encoder.width 8"),
        (
            "m3p",
            "fine_tune",
            "--model.model.encoder.width 64 --model.model.encoder.feed_forward_width 256 "
            "--model.updates per_cycle --model.accumulate 1",
        ),
    ],
)
def test_memory_and_arithmetic_are_those_of_a_real_step(paper: str, recipe: str, overrides: str) -> None:
    run = resolve(paper, recipe, scale="smoke", arguments=overrides.split())
    found = estimate(run, size=8)
    watched = _Profiled(last=2)
    # Turn dropout off, since the CPU, unlike a GPU, has no fused attention with dropout.
    training = synthetic_training(run, {"accelerator": "cpu", "callbacks": [watched, StopAfter(3)]}, RandomTensors(), 8)
    for module in training.module.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    training.run()
    module, optimizers = training.module, training.trainer.optimizers
    assert found.parameters == sum(p.numel() for p in module.parameters())
    state = [*module.parameters(), *module.buffers(), [o.state_dict() for o in optimizers]]
    held = MemoryMeter()
    held.add([state, training.data.synthetic.batch])
    assert found.flops == watched.flops
    # Count the memory of the step only, without the batch, which was allocated before.
    real = watched.peak
    expected = found.peak_bytes - held.now
    print(f"{paper}: {expected / 1e6:.2f} MB estimated, {real / 1e6:.2f} MB by torch's allocator")
    assert expected == pytest.approx(real, rel=0.12)  # the size of workspaces depends on the processor


def test_several_devices_share_the_batch_and_exchange_gradients() -> None:
    one = resolve("mct", "moco_v2", scale="smoke", arguments=("--data.batch_size", "8"))
    two = resolve("mct", "moco_v2", scale="smoke", arguments=("--data.batch_size", "8", "--trainer.devices", "2"))
    alone, together = estimate(one), estimate(two)
    assert (alone.size, together.size) == (8, 4)
    half = estimate(one, size=4)
    assert 0 < together.peak_bytes - half.peak_bytes <= 4 * half.parameters  # the copy of the gradients
    odd = resolve("mct", "moco_v2", scale="smoke", arguments=("--data.batch_size", "9", "--trainer.devices", "2"))
    with pytest.raises(StageError, match="divisible by 2"):
        estimate(odd)


def test_an_empty_batch_takes_no_memory() -> None:
    if not (pages := Path("/proc/self/statm")).exists():
        pytest.skip("only Linux counts resident pages in /proc")
    before = int(pages.read_text().split()[1])
    batch = RandomTensors(empty=True).normal(64, 2**20)  # 256 MiB
    assert batch.shape == (64, 2**20)
    assert int(pages.read_text().split()[1]) - before < 4096


def test_hours_follow_from_the_card_and_the_precision() -> None:
    card = CARDS[1]
    seconds = 40e12 / 312e12 / 0.5
    assert FOUND.hours(card, 0.5) == pytest.approx(seconds * 1000 * 8 / 3600)
    full = replace(FOUND, precision="32-true")
    seconds = 30e12 / 156e12 + 10e12 / 19.5e12
    assert full.hours(card, 1.0) == pytest.approx(seconds * 1000 * 8 / 3600)
    assert replace(FOUND, steps=None).hours(card, 0.5) is None


def test_steps_are_whole_epochs_of_the_published_size() -> None:
    published = paper_named("mct").name
    run = resolve(published, "mct", scale="paper", hardware="gpu8")
    assert estimates._steps(run, 118_287 // 256, 1) == 200 * 462
    limited = resolve(published, "mct", scale="paper", arguments=("--trainer.limit_train_batches", "10"))
    assert estimates._steps(limited, 462, 1) == 2000
    assert estimates._steps(limited, 462, 4) == 600
    assert estimates._steps(run, None, 1) is None


def test_steps_of_a_recipe_that_counts_them_are_counted_as_it_does() -> None:
    """Two groups of losses make two updates in the first of two batches, which is one update per batch on average."""
    published = resolve("m3p", "m3p", scale="paper")
    assert estimates._steps(published, 833, 0.8) == published.config["trainer"]["max_steps"]
    by_group, by_cycle = (
        estimate(resolve("m3p", "fine_tune", scale="smoke", arguments=("--model.updates", updates)), size=4)
        for updates in ("per_group", "per_cycle")
    )
    assert (by_group.accumulated, by_cycle.accumulated) == (1.0, 2)
    assert by_cycle.flops == 2 * by_group.flops


def test_a_checkpoint_is_as_large_as_estimated(tmp_path: Path) -> None:
    run = resolve("mct", "moco_v2", scale="smoke", arguments=("--model.image_encoder.channels", "[32, 32, 64, 64]"))
    found = estimate(run, size=4)
    training = synthetic_training(run, {"accelerator": "cpu", "callbacks": [StopAfter(2)]}, RandomTensors(), 4)
    training.run()
    path = tmp_path / "last.ckpt"
    training.trainer.save_checkpoint(path)
    assert path.stat().st_size == pytest.approx(found.checkpoint_bytes, rel=0.08)


@pytest.mark.parametrize(("recipe", "clips", "mined"), [("cma_audioset", 1_784_108, 32), ("ablation_cma", 10**5, 128)])
def test_banks_of_the_whole_set_are_counted(recipe: str, clips: int, mined: int) -> None:
    """Memory and checkpoint hold two vectors of 128 numbers and the mined positives of every clip in the list."""
    narrow = ["--model.video_encoder.width", "4", "--model.audio_encoder.width", "4"]
    found = estimate(resolve("avid_cma", recipe, scale="paper", arguments=narrow), size=2)
    banks = clips * (2 * 128 + mined) * 4
    assert found.peak_bytes > banks + 4 * found.parameters
    # The checkpoint also has the weights and Adam's two moments.
    assert banks < found.checkpoint_bytes - 3 * 4 * found.parameters < banks + 100_000
    assert found.steps == {"cma_audioset": 40 * 3484, "ablation_cma": 75 * 1785}[recipe]


def test_a_miniature_is_estimated_as_well() -> None:
    assert estimate(resolve("xmc_gan", "xmc_gan", scale="mini")).flops > 0
    with pytest.raises(StageError, match="pictures have no attributes"):
        estimate(resolve("xmc_gan", "mini_image_network", scale="mini"))


def test_the_plan_shows_an_estimate_of_every_configuration_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "mct", "--scale", "smoke", "--stages", "moco_v2", "in_sup", "--estimate", "--seeds", "0", "1"]
    command += ["--runs", str(tmp_path), "--data", str(tmp_path), "--utilization"]
    calls: list[Any] = []

    def found(run: Any) -> Estimate:
        calls.append(run)
        if run.recipe == "moco_v2":
            return FOUND
        return replace(FOUND, steps=None, accumulated=2, convolution_flops=0, other_flops=0, loader_bytes=0)

    monkeypatch.setattr(estimates, "estimate", found)
    assert main([*command, "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(calls) == 2
    rows = (
        "in_sup seed {} 8 x 2 8 300.0 M 41.1 GB 3.5 GB 0 MB 0 - - - - -",
        "moco_v2 seed {} 8 8 300.0 M 41.1 GB 3.5 GB 16.0 GB 40 1,000 791 1.1 0.57 0.18",
    )
    assert [" ".join(line.split()) for line in sorted(lines[1:-2])] == [row.format(n) for row in rows for n in (0, 1)]
    assert lines[-2].split() == ["all", "2.2", "1.1", "0.36"]
    assert lines[0].endswith("samples/s    h RTX 4090  h A100 80 GB    h H100 SXM")
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "50% of" in lines[-1]
    assert main([*command, "3"]) == 2
    assert main(["plan", "mct", "--scale", "paper", "--stages", "mct", "--estimate", "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("--hardware cpu: estimates for one GPU that takes the whole batch")


def test_with_given_weights_the_cheapest_stage_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "avid.pth").write_bytes(b"x")
    monkeypatch.setattr(estimates, "one_core", lambda: Card("one core", 0.1, 0.1, 0.1))
    flags = ["--given", f"avid={tmp_path / 'avid.pth'}", "--runs", str(tmp_path), "--stages", "ucf_1@avid", "esc@avid"]
    flags += ["--data", str(tmp_path)]
    assert main(["plan", "avid", "--scale", "paper", "--hardware", "gpu1", "--estimate", *flags]) == 0
    head, first, second = (printed := capsys.readouterr().out).splitlines()[:3]
    assert head.split("  ")[0] == "stage"
    assert [first.split()[k] for k in (0, 5)] == ["esc@avid", "yes"]
    assert [second.split()[k] for k in (0, 5)] == ["ucf_1@avid", "no"]
    assert f"  no: ESC-50 missing: {tmp_path / 'esc50'}" in first
    # A note below the table says where the file of statistics came from.
    assert "no; computed from the evaluated data" in printed
    # The SVM makes two passes over the ten windows of 2,000 files, at 2.88 GFLOP per window.
    found = estimate(resolve("avid_cma", "esc50_svm", scale="paper"))
    assert found.steps == 40_000
    assert found.flops == pytest.approx(2.88e9, rel=0.01)
    assert float(first.split()[4]) == pytest.approx(40_000 * 2.88e9 / 0.1e12 / 0.3 / 3600, rel=0.05)
