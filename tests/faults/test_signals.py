"""Check that a signal at any moment, even during imports, rendering and tables, ends the command and fails no stage."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.distributed.harness import ending_as_a_group, free_port
from tests.distributed.small_mct import small_layer
from tests.distributed.stages import over
from tests.machine import LONG, send_when_caught, until

#: A program that runs a command and gives a stage three seconds to save. The ranks run the same file.
IMPATIENT = """
import sys
from assemble.commands.main import main
from assemble.stages import stopping
stopping.PATIENCE = 3.0
sys.exit(main())
"""


def _start(command: list[str], *program: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *(program or ("-m", "assemble")), *command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _stop(process: subprocess.Popen[str], after: float, number: int) -> None:
    """Send a signal after some seconds. The command must end with its status, without failure or leftover processes."""
    try:
        output, _ = process.communicate(timeout=after)
        assert process.returncode == 0, output
        return  # this run was faster than the timed run
    except subprocess.TimeoutExpired:
        # A terminal sends Ctrl-C to every process.
        if not send_when_caught(process, number, os.killpg if number == signal.SIGINT else os.kill):
            return
    with ending_as_a_group(process):
        output, _ = process.communicate(timeout=LONG)
        assert process.returncode in (128 + number, -number), output
        assert "FAILED" not in output
        assert "Traceback" not in output


def _results(runs: Path) -> dict[str, Any]:
    return {
        record.parent.name: (
            json.loads(record.read_text(encoding="utf-8"))["metrics"],
            (record.parent / "metrics.csv").read_text(encoding="utf-8"),
        )
        for record in runs.rglob("record.json")
    }


def test_reproduce_stopped_at_random_points_resumes(tmp_path: Path) -> None:
    command = ["reproduce", "mct", "--scale", "smoke", "--jobs", "1", "--stages", "moco_v2", "--runs"]
    began = time.monotonic()
    whole = _start([*command, str(tmp_path / "whole")])
    output, _ = whole.communicate(timeout=LONG)
    assert whole.returncode == 0, output
    seconds, draw = time.monotonic() - began, random.Random(0)
    for turn, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)):
        cache = {"ASSEMBLE_CACHE": str(tmp_path / "cache")} if turn == 0 else {}  # render the world again
        process = _start([*command, str(tmp_path / "stopped")], **cache)
        _stop(process, seconds * draw.random(), number)
    resumed = _start([*command, str(tmp_path / "stopped")])
    output, _ = resumed.communicate(timeout=LONG)
    assert resumed.returncode == 0, output
    assert _results(tmp_path / "stopped") == _results(tmp_path / "whole") != {}


def test_a_rank_that_waits_for_a_frozen_one_ends_both(tmp_path: Path) -> None:
    layer, program = tmp_path / "two.yaml", tmp_path / "impatient.py"
    layer.write_text(json.dumps(over(small_layer({"queue_size": 64}), 2)), encoding="utf-8")
    program.write_text(IMPATIENT, encoding="utf-8")
    options = ["--scale", "smoke", "--runs", str(tmp_path), "--config", str(layer)]
    # A program in another folder needs PYTHONPATH to find the suite.
    found = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": free_port(), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = _start(["fit", "mct/mct_tag", *options], str(program), **found)
    ranks = until(lambda: _ranks(process.pid) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    os.kill(ranks[0], signal.SIGSTOP)
    latest = time.monotonic() + 60
    while not _waits(process.pid) and time.monotonic() < latest:
        pass  # an earlier signal would end it as well
    _stop(process, 0.1, signal.SIGTERM)


def _waits(pid: int) -> bool:
    """Check whether a process is waiting: it uses less than 0.4 s of CPU time in two seconds."""

    def hundredths() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = hundredths()
    time.sleep(2)
    return hundredths() - before < 40


def _ranks(parent: int) -> list[int]:
    """Return the ranks that a process started. Other children, such as git, are short-lived."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
    found = []
    for pid in children:
        with suppress(OSError):
            if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(int(pid))
    return found
