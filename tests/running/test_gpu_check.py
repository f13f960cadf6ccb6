"""The measurement of a step on the CPU, at the smallest widths: the code that runs on a GPU, but for its events."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from common.commands.main import main
from common.reporting import records
from common.stages import gpu_check
from common.stages.configuration import resolve
from common.stages.loading import measure_loading


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
    found = record.metrics
    assert found["flops"] > 1e6
    assert found["matrix_rate"] > 1e7
    # Both are timed while other processes come and go.
    assert found["flops"] / found["step_seconds"] < 100 * found["matrix_rate"]
    assert found["host_waits"] is None
    # An ordinary record, which is listed with the runs.
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    assert "gpu_check_moco_v2" in capsys.readouterr().out


def test_a_gpu_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a double of CUDA, whose steps take 100 and 200 ms."""
    cuda = Mock(**{"max_memory_allocated.return_value": 7})
    cuda.Event.return_value.elapsed_time.side_effect = [100.0, 200.0]
    cuda.profiler.key_averages.return_value = [
        SimpleNamespace(
            key=key, device_type=f"DeviceType.{device}", is_user_annotation=key == "Optimizer",
            self_device_time_total=micros, self_cpu_time_total=micros / 2,
        )
        for key, device, micros in (
            ("copy", "CUDA", 2e4), ("gemm", "CUDA", 6e4), ("gemm", "CUDA", 2e4), ("Optimizer", "CUDA", 1e6),
            ("aten::mm", "CPU", 1e6), ("aten::t", "CPU", 0.0),
        )
    ]  # fmt: skip
    monkeypatch.setattr(gpu_check, "torch", Mock(cuda=cuda))
    gpu, cpu = (gpu_check._Watch(own, warm_up=1, steps=2) for own in (True, False))
    gpu._profiler = cpu._profiler = cuda.profiler
    for number in range(6):
        cuda.batch(number)
        gpu.on_train_batch_start(None, None, None, number)  # type: ignore[arg-type]
        gpu.on_train_batch_end(None, None, None, None, number)  # type: ignore[arg-type]
    mark, wait = ("Event", "Event().record"), ("default", "synchronize")
    assert [one.args[0] if one.args else one[0] for one in cuda.mock_calls] == [
        0, 1, "synchronize", "reset_peak_memory_stats", "warn", *mark, 2, *mark, 3, *mark, *wait,
        "max_memory_allocated", 4, "profiler.start", *wait, 5, *wait, "profiler.stop",
    ]  # fmt: skip
    assert (gpu.seconds(), gpu.peak) == ([0.1, 0.2], 7)
    assert list(gpu.kernels().items()) == [("gemm", pytest.approx(0.04)), ("copy", 0.01)]
    assert cpu.kernels() == {"aten::mm": 0.25}  # operations stand for kernels


def test_samples_are_read(tmp_path: Path) -> None:
    told = measure_loading(resolve("avid_cma", "avid", scale="smoke"), tmp_path, seconds=0.1)
    assert re.match(r"\d.* samples a second on a core, .* MB read for each", told)
