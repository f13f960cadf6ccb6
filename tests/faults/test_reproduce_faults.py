"""Test stopping a run of many stages, and running it while another process runs the same stages."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from assemble.stages import reproduce as schedule
from assemble.stages import run as running
from assemble.stages import stopping
from assemble.stages.plan import plan_stages
from assemble.stages.request import Selection
from common.errors import Preempted, StageError
from tests.distributed.harness import ending_as_a_group
from tests.machine import LONG, runs, send_when_caught, until


def test_termination_leaves_no_worker_behind(tmp_path: Path) -> None:
    """Stop the stages that run in parallel when the main process gets SIGTERM, as from a scheduler or `kill`.

    A second SIGTERM changes nothing.
    """
    command = [sys.executable, "-m", "assemble", "reproduce", "mct", "--scale", "smoke", "--jobs", "2"]
    # With many seeds, the command isn't finished before the signal comes.
    options = ["--stages", "moco_v2", "mct", "--seeds", *map(str, range(8)), "--runs", str(tmp_path)]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    with ending_as_a_group(process):
        # When two folders are locked, both workers have begun.
        until(lambda: len(list(tmp_path.rglob(".*.lock"))) >= 2 or process.poll() is not None)
        process.terminate()
        time.sleep(0.3)
        send_when_caught(process, signal.SIGTERM)
        output, _ = process.communicate(timeout=LONG)
        assert process.returncode == 143, output
        assert "stopped; rerun the command to resume" in output


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time; from assemble.stages.reproduce import _pool\n"
        "if __name__ == '__main__':\n"
        "    pool = _pool(2); found = {pool.submit(os.getpid).result() for _ in range(3)}\n"
        "    [pool.submit(time.sleep, 60) for _ in range(2)]; time.sleep(1)\n"
        "    print(*pool._processes, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code, encoding="utf-8")
    killed = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    workers = [int(word) for word in killed.stdout.split()]
    assert workers
    until(lambda: not any(map(runs, workers)))


class _Begun:
    """Replacement for a planned stage in a worker. Ends at once, or trains until a signal and then saves."""

    def __init__(self, folder: Path, trains: bool) -> None:
        self.folder, self.trains = folder, trains

    @property
    def request(self) -> None:
        asked: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
        (self.folder / f"began {self.trains}").touch()
        until((self.folder / f"began {not self.trains}").exists)  # each stage gets a worker
        while self.trains and not asked:
            time.sleep(0.05)
        if self.trains:
            time.sleep(0.5)  # the pool sends a second signal when another worker dies
            (self.folder / "saved").touch()
        signal.signal(signal.SIGTERM, before)
        if not self.trains:
            raise StageError("ended")
        raise Preempted(signal.SIGTERM)


def test_a_worker_that_saved_does_not_wait_for_one_that_is_gone(tmp_path: Path) -> None:
    """Let the worker without a stage die while this worker holds the lock of the pool's queue."""
    pool = schedule._pool(2)
    stopping = threading.Thread(target=pool.shutdown, daemon=True)
    workers: list[multiprocessing.process.BaseProcess] = []
    try:
        ended = pool.submit(schedule.start_stage, _Begun(tmp_path, trains=False))  # type: ignore[arg-type]
        trains = pool.submit(schedule.start_stage, _Begun(tmp_path, trains=True))  # type: ignore[arg-type]
        workers += pool._processes.values()  # type: ignore[attr-defined]
        assert len(workers) == 2
        assert isinstance(ended.exception(LONG), StageError)
        for worker in workers:
            worker.terminate()
        stopping.start()
        stopping.join(LONG)
        assert not stopping.is_alive()
        assert isinstance(trains.exception(0), BrokenProcessPool)
        assert (tmp_path / "saved").exists()
    finally:
        for worker in workers:  # other tests keep children of their own
            worker.kill()


def test_what_another_run_finished_meanwhile_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = plan_stages("mct", Selection(scale="smoke", runs=tmp_path, data=tmp_path, stages=("moco_v2",)))
    assert not item.done
    monkeypatch.setattr(running, "finished_record", lambda stage: f"the other run's record of {stage.stage}")
    assert schedule.start_stage(item) == "the other run's record of moco_v2"


class _Broken(Executor):
    """A pool whose process is killed at the first task, as the kernel does when memory runs out."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("terminated abruptly"))
        return future


def test_a_worker_that_is_killed_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_pool", lambda jobs: _Broken())
    wanted = Selection(scale="smoke", runs=tmp_path, data=tmp_path, stages=("moco_v2", "in_sup"))
    with pytest.raises(StageError, match=r"killed, .* memory ran out\. .*`--jobs 1`"):
        schedule.run_paper("mct", wanted, jobs=2)


def test_a_stage_in_a_process_of_its_own_is_told_and_waited_for(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    # The child asks its parent to end, as `kill` would, and needs a second to save.
    save = f"trap 'sleep 1; touch {saved}; exit 143' TERM"
    child = f"{save}; read x; kill -TERM {os.getpid()}; while :; do sleep 0.1; done"
    with (
        pytest.raises(Preempted) as stop,
        stopping.listening(),
        subprocess.Popen(["sh", "-c", child], stdin=subprocess.PIPE) as process,
        stopping.waiting_for(process.send_signal),
    ):
        process.communicate(b"\n")
    assert process.returncode == stop.value.status == 143
    assert saved.exists()


@pytest.mark.parametrize(
    ("signals", "waits", "status", "told"),
    [
        ([signal.SIGINT, signal.SIGINT], True, 130, [15, 9]),  # the command sends its children SIGTERM for Ctrl-C
        ([signal.SIGTERM, signal.SIGINT], True, 143, [15, 9]),
        ([signal.SIGHUP, signal.SIGTERM], False, 129, []),
        ([signal.SIGUSR1], False, 138, []),
    ],
)
def test_a_command_that_does_not_stop_is_ended_with_its_processes(
    signals: list[int], waits: bool, status: int, told: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    def stuck() -> None:
        stopping.PATIENCE = 0.1 if not waits else LONG
        os.environ["SLURM_JOB_ID"] = "1"
        with stopping.listening(), stopping.waiting_for(lambda number: os.write(1, b"%d\n" % number)):
            stopping._listener.children *= waits  # type: ignore[union-attr]
            stopping.at_end(lambda number: print(-number, flush=True))
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.2)
            time.sleep(LONG)

    process = multiprocessing.get_context("fork").Process(target=stuck)
    process.start()
    process.join(LONG)
    assert process.exitcode == status
    ended = "stopped at once; rerun the command to resume from the last checkpoints"
    assert capfd.readouterr().out.splitlines() == [*map(str, told), str(-signals[0]), ended]
