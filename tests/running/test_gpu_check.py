"""Measure a step on the CPU at the smallest widths, with the same code as on a GPU except for CUDA events."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest

from assemble.commands.main import main
from assemble.reporting import records
from assemble.stages import gpu_check, loading
from assemble.stages.configuration import resolve


def test_a_step_is_measured_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["gpu-check", "mct", "--recipe", "moco_v2", "--device", "cpu", "--small", "--precision", "32-true"]
    command += ["--runs", str(tmp_path)]
    assert main([*command, "--model.loss.queue_size", "64"]) == 0
    printed = capsys.readouterr().out
    assert "where the time goes" in printed
    assert "moco_v2" in printed
    (record,) = records.find(tmp_path)
    assert (record.paper, record.stage, record.scale) == ("mct", "gpu_check_moco_v2", "smoke")
    assert (record.global_batch, record.steps, record.precision) == (4, 2, "32-true")
    missing = {name for name, value in record.metrics.items() if value is None}
    assert missing == {"peak_bytes", "host_waits", "idle_share"}
    # The measurement is an ordinary record, so `assemble runs` lists it.
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    assert "gpu_check_moco_v2" in capsys.readouterr().out


def test_a_missing_gpu_is_named_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu-check"]) == 2
    assert capsys.readouterr().err.count("torch finds no GPU") == 1


def test_a_gpu_has_kernels_and_a_cpu_has_operations() -> None:
    events = [
        SimpleNamespace(
            key=key, device_type=f"DeviceType.{device}", is_user_annotation=key == "Optimizer",
            self_device_time_total=micros, self_cpu_time_total=micros / 2,
        )
        for key, device, micros in (
            ("copy", "CUDA", 2e4), ("gemm", "CUDA", 6e4), ("gemm", "CUDA", 2e4), ("Optimizer", "CUDA", 1e6),
            ("aten::mm", "CPU", 1e6), ("aten::t", "CPU", 0.0),
        )
    ]  # fmt: skip
    gpu, cpu = (gpu_check._Watch(own, warm_up=1, steps=2) for own in (True, False))
    gpu._profiler = cpu._profiler = Mock(**{"key_averages.return_value": events})
    assert list(gpu.kernels().items()) == [("gemm", pytest.approx(0.04)), ("copy", 0.01)]
    assert cpu.kernels() == {"aten::mm": 0.25}


@pytest.mark.parametrize(("busy", "idle", "whole", "size"), [(0.15, 0.25, "256", 32), (0.3, 0.0, "8", 2)])
def test_the_record_of_a_gpu(busy: float, idle: float, whole: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record steps that take 0.1, 0.2 and 0.6 s and that wait for the device 30 times in total."""
    double, given = Mock(**{"cuda.get_device_name.return_value": "H100"}), []
    timer = Mock(**{"return_value.timeit.side_effect": lambda times: Mock(median=0.01 * times)})

    def training(run: Any, trainer: dict[str, Any], draw: Any, size: int) -> Any:
        _, watch, stop = trainer.pop("callbacks")
        devices = run.config["trainer"]["devices"]
        given.append((devices, trainer, draw.empty, size, watch.warm_up, watch.last, watch.profiled, stop.batches))
        watch.seconds, watch.kernels, watch.peak = lambda: [0.1, 0.2, 0.6], lambda: {"gemm": 0.1, "copy": busy - 0.1}, 7
        return SimpleNamespace(run=lambda: [warnings.warn("called a synchronizing", stacklevel=1) for _ in range(30)])

    for name, value in {
        "torch": double, "benchmark.Timer": timer, "synthetic_training": training, "Record": SimpleNamespace,
        "estimate": lambda run, size: SimpleNamespace(flops=6e9 * size, accumulated=2),
    }.items():  # fmt: skip
        monkeypatch.setattr(f"assemble.stages.gpu_check.{name}", value)
    warnings.simplefilter("ignore")
    record = gpu_check.measure("avid", arguments=["--data.batch_size", whole])[0]
    trainer = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}
    assert given == [(8, trainer, False, size, 5, 25, 5, 31)]
    assert record.metrics == {
        "step_seconds": 0.2, "step_seconds_std": pytest.approx((0.14 / 3) ** 0.5), "flops": 3e9 * size,
        "matrix_rate": 2 * 8192**3 / 0.1, "peak_bytes": 7.0, "host_waits": 1.5, "idle_share": pytest.approx(idle),
    }  # fmt: skip
    assert (record.hardware["accelerators"], record.global_batch, record.steps) == (["H100"], size, 20)
    assert (record.row, record.seed, record.scale, len(record.started)) == (None, 0, "paper", 25)
    assert (record.precision, record.versions, record.wall_seconds >= 0) == ("bf16-mixed", records.versions(), True)
    assert double.randn.mock_calls[-2:] == [call(8192, 8192, device="cuda"), call().to(double.bfloat16)]


def test_samples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "time", SimpleNamespace(process_time=iter([1.0, 1.1, 1.25, 1.5]).__next__))
    monkeypatch.setattr(loading, "_bytes_read", iter([5e6, 29e6]).__next__)
    told = loading.measure_loading(resolve("avid_cma", "avid", scale="smoke"), tmp_path, seconds=0.5)
    assert told == "16 samples per second on one core, 3 MB read per sample (8 samples)"
