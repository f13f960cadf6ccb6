"""A run of many stages that is stopped, or that meets another run of the same stages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.training import schedule
from common.training.errors import Preempted
from common.training.schedule import Selection, plan


def test_termination_leaves_no_worker_behind(tmp_path: Path) -> None:
    """SIGTERM, which a scheduler or `kill` sends to one process alone, ends the stages that run beside each other."""
    command = [sys.executable, "-m", "common.training.main", "reproduce", "mct", "--scale", "smoke", "--jobs", "2"]
    options = ["--stages", "moco_v2", "mct", "--runs", str(tmp_path)]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        # Both workers have begun when both folders are theirs.
        deadline = time.monotonic() + 120
        while len(list(tmp_path.rglob(".*.lock"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 143
        assert "stopped; the same command goes on where it was" in output
        deadline = time.monotonic() + 30
        while _lives(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        if _lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def _lives(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_another_run_finished_meanwhile_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = plan("mct", Selection(scale="smoke", runs=tmp_path, data=tmp_path, stages=("moco_v2",)))
    assert not item.done
    lineages: list[str] = []

    def found(request: object, lineage: str) -> str:
        lineages.append(lineage)
        return "the other run's record"

    monkeypatch.setattr(schedule, "finished_record", found)
    assert schedule._run(item) == "the other run's record"
    assert lineages == [item.lineage]
    assert not item.request.directory.exists()


def test_a_stage_in_a_process_of_its_own_is_told_and_waited_for(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    # It asks its parent to end, as `kill` would, and takes a second to save.
    child = (
        f"trap 'sleep 1; touch {saved}; exit 143' TERM; sleep 1; kill -TERM {os.getpid()}; while :; do sleep 0.1; done"
    )
    with pytest.raises(Preempted) as stop, schedule._termination_as_interrupt():
        schedule._wait_for(["sh", "-c", child])
    assert stop.value.status == 143
    assert saved.exists()
