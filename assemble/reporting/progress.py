"""Show the progress that each running stage writes to a file in its folder."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.files import read_bytes

FILE = "progress.json"


class Watch(ExitStack):
    """Show a line per running stage, updated in place, on a terminal. Elsewhere, print a line when a stage ends."""

    def __init__(self) -> None:
        super().__init__()
        self._running: dict[str, tuple[Path, float]] = {}

    def __enter__(self) -> Watch:
        if sys.stdout.isatty():
            from rich.live import Live
            from rich.text import Text

            shown = Live(get_renderable=lambda: Text("\n".join(self.lines())), refresh_per_second=1, transient=True)
            self.enter_context(shown)
        return self

    def begin(self, name: str, folder: Path) -> None:
        self._running[name] = folder, time.time()

    def end(self, name: str) -> None:
        self._running.pop(name, None)

    def lines(self) -> list[str]:
        return [f"  {name}: {_text(folder, since)}" for name, (folder, since) in list(self._running.items())]


def read(folder: Path, since: float) -> dict[str, Any] | None:
    """Read `step`, `share` of the training, `loss` and seconds `left`. None if nothing was written after `since`."""
    file = folder / FILE
    try:
        # An earlier session may have left a file. Some file systems round times.
        return json.loads(read_bytes(file)) if file.stat().st_mtime >= since - 1 else None
    except (OSError, ValueError):
        return None


def _text(folder: Path, since: float) -> str:
    progress = read(folder, since)
    if progress is None:
        return f"{time.time() - since:.0f} s"
    loss = "" if progress["loss"] is None else f", loss {progress['loss']:.4g}"
    left = "" if progress["left"] is None else f", {duration(progress['left'])} left"
    return f"step {progress['step']}, {100 * progress['share']:.0f} %{loss}{left}"


def duration(seconds: float) -> str:
    """Write a duration as `45 s`, `3.2 min` or `38.0 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
