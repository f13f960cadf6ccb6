"""Show the progress that each running stage writes to a file in its folder."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.files import read_bytes

FILE = "progress.json"
#: Shortest time in seconds between two lines about a stage in a log.
QUIET = 60.0


class Watch(ExitStack):
    """Show running stages: on a terminal, lines that update in place; else a new line per quarter of a training."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say
        self._running: dict[str, tuple[Path, float]] = {}
        self._told: dict[str, tuple[int, float]] = {}

    def __enter__(self) -> Watch:
        if sys.stdout.isatty():
            from rich.live import Live
            from rich.text import Text

            shown = Live(get_renderable=lambda: Text("\n".join(self.lines())), refresh_per_second=1, transient=True)
            self.enter_context(shown)
        else:
            ended = threading.Event()
            thread = threading.Thread(target=self._tell_on, args=(ended,), daemon=True)
            thread.start()
            self.callback(thread.join)
            self.callback(ended.set)
        return self

    def begin(self, name: str, folder: Path) -> None:
        self._running[name] = folder, time.time()

    def end(self, name: str) -> None:
        self._running.pop(name, None)

    def lines(self) -> list[str]:
        return [
            f"  {name}: {_text(read(folder, since)) or f'{time.time() - since:.0f} s'}"
            for name, (folder, since) in list(self._running.items())
        ]

    def tell(self, now: float) -> None:
        """Print a line for each stage that reached another quarter, at most one per minute."""
        for name, (folder, since) in list(self._running.items()):
            quarter, at = self._told.get(name, (0, since))
            progress = read(folder, since)
            if progress is None:
                continue
            reached = int(4 * progress["share"])
            if quarter < reached < 4 and now - at >= QUIET:
                self._told[name] = reached, now
                self._say(f"  {name}: {_text(progress)}")

    def _tell_on(self, ended: threading.Event) -> None:
        while not ended.wait(2.0):
            self.tell(time.time())


def read(folder: Path, since: float) -> dict[str, Any] | None:
    """Read the progress written after `since`: `step`, `share` of the training, `loss`, and seconds `left`. Or None."""
    try:
        if (
            folder / FILE
        ).stat().st_mtime < since - 1:  # The file is from an earlier session. Allow for file systems that round times.
            return None
        return json.loads(read_bytes(folder / FILE))
    except (OSError, ValueError):
        return None


def _text(progress: dict[str, Any] | None) -> str:
    if progress is None:
        return ""
    loss = "" if progress["loss"] is None else f", loss {progress['loss']:.4g}"
    left = "" if progress["left"] is None else f", {duration(progress['left'])} left"
    return f"step {progress['step']}, {100 * progress['share']:.0f} %{loss}{left}"


def duration(seconds: float) -> str:
    """Write a duration as `45 s`, `3.2 min` or `38.0 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
