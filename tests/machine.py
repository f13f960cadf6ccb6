"""Wait for other processes on machines of any speed, and check which programs the machine must have."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Timeout in seconds that is long enough for any step, even on a slow machine. It ends before pytest's limit.
LONG = 500.0


def until(condition: Callable[[], Any], what: str = "", seconds: float = LONG) -> Any:
    """Wait until a condition returns a true value, and return this value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return found


def _status(process: Path) -> list[str]:
    """Return the state, parent, group and more of a process. The state of a process that ended is Z or X."""
    try:
        return (process / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ["X", "", ""]


def runs(pid: int) -> bool:
    """Check whether a process runs. A process that ended doesn't, even if its parent hasn't read the exit status."""
    return _status(Path(f"/proc/{pid}"))[0] not in "ZX"


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, directly or indirectly."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread just ended
            children += map(int, path.read_text(encoding="ascii").split())
    return [*children, *(below for child in children for below in descendants(child))]


def group_runs(group: int) -> bool:
    """Check whether any process of a group runs."""
    found = map(_status, Path("/proc").glob("[0-9]*"))
    return any(state not in "ZX" and own == str(group) for state, _, own, *_ in found)


def send_when_caught(process: subprocess.Popen[Any], number: int, send: Callable[[int, int], object] = os.kill) -> bool:
    """Send a signal when a process catches SIGTERM. Return False if the process ends before.

    At another time, the signal would end the process at once.
    """
    while process.poll() is None:
        os.kill(process.pid, signal.SIGSTOP)  # nothing must change between the check and the signal
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8"))
        catches = caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
        if catches:
            send(process.pid, number)
        os.kill(process.pid, signal.SIGCONT)
        if catches:
            return True
        time.sleep(0.05)
    return False


def promised(what: str) -> bool:
    """Check whether ASSEMBLE_TESTS_HAVE names a program. If so, its tests fail where the program is missing."""
    return what in os.environ.get("ASSEMBLE_TESTS_HAVE", "").split()
