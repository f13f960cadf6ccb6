"""Wait for other processes on machines of any speed, and check which programs the machine must have."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Timeout in seconds that is long enough for any step, even on a slow machine.
LONG = 600.0


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
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(word) for path in tasks for word in path.read_text(encoding="ascii").split()]
    return [*children, *(below for child in children for below in descendants(child))]


def group_runs(group: int) -> bool:
    """Check whether any process of a group runs."""
    found = map(_status, Path("/proc").glob("[0-9]*"))
    return any(state not in "ZX" and own == str(group) for state, _, own, *_ in found)


def promised(what: str) -> bool:
    """Check whether ASSEMBLE_TESTS_HAVE names a program. If so, its tests fail where the program is missing."""
    return what in os.environ.get("ASSEMBLE_TESTS_HAVE", "").split()
