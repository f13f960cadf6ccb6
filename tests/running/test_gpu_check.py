"""The measurement of a step on the CPU, at the smallest widths: the code that runs on a GPU, but for its events."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.commands.main import main
from common.reporting import records
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
    assert found["step_seconds"] > 0
    assert found["flops"] > 1e6
    assert found["matrix_rate"] > 1e7
    # Both are timed while other processes come and go.
    assert found["flops"] / found["step_seconds"] < 100 * found["matrix_rate"]
    assert found["host_waits"] is None
    # An ordinary record, which is listed with the runs.
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    assert "gpu_check_moco_v2" in capsys.readouterr().out


def test_samples_are_read(tmp_path: Path) -> None:
    told = measure_loading(resolve("avid_cma", "avid", scale="smoke"), tmp_path, seconds=0.1)
    assert re.match(r"\d.* samples a second on a core, .* MB read for each", told)
