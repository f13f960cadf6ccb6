"""The most memory that this process held, as Linux counts it."""

from __future__ import annotations

import contextlib
from pathlib import Path


def reset_peak_memory() -> None:
    """Count from what is held now; without effect where the system does not offer it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gib() -> float | None:
    """Peak of the resident memory in GiB since the last reset, without loader processes; None where it is unknown."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 2**20, 2)
    return None
